"""Compares a sweep of 11 λ values with mixed decoding, and with eleven merged checkpoints in turn.

    python -m bench.sweep [--questions 30] [--samples 4] [--rounds N]

Everything runs on the embedded pair in fp32, at T = 0.7, with the same questions and seeds in every
row of a round. Rows, in new tokens a second:

    engine, 32 λ    row c of bench.engine: 32 requests, 32 λ values, 128 new tokens, no HTTP
    sweep           what `mi-server sweep` does: all λ values at once, over HTTP, from the first
                    question to the last answer; server and client share the cores
    merges in turn  eleven merged checkpoints one after another, each in an engine that is already
                    loaded; in this process, no HTTP

The advantage of a sweep depends on the number of answers for each λ: few answers make small
batches, and every run waits for its longest answer. Two more rows are the seconds that a user of
the commands would wait:

    sweep, from start   start a server, run all requests, stop it
    servers in turn     eleven times: merge a checkpoint, start a server on it, run the requests,
                        stop it
"""

import argparse
import asyncio
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from bench.engine import speed
from bench.measuring.folders import BUILD
from bench.measuring.publishing import interleaved, publish
from bench.models.static_engine import StaticEngine, blended_config, write_merged
from bench.models.workloads import EMBEDDED_PAIR, REQUESTS
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.engine import Engine
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.worker import default_threads
from server.sweep.collect import RequestOptions, collect_samples
from server.sweep.graders import grader_named
from server.sweep.grid import PlannedSample, curves_of, planned_samples
from server.sweep.http_client import ServerClient
from server.sweep.own_server import own_server
from server.sweep.samples import SampleLog
from server.sweep.tasks import embedded_task
from server.text.checkpoint import EndpointText
from server.text.prompt import PromptBuilder
from server.wire.messages import Message

LAMBDAS = [value / 10 for value in range(11)]
MAX_TOKENS = 512
CONCURRENCY = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(default_threads())
    seeds = itertools.count()

    def work() -> list[PlannedSample]:
        return units(arguments.questions, arguments.samples, next(seeds))

    with tempfile.TemporaryDirectory() as folder, own_server([], Path(folder, "server")) as url:
        values = interleaved(rows(url, work, seeds), arguments.rounds)
    values |= interleaved(
        {
            "sweep, from start": lambda: swept_from_start(work()),
            "servers in turn": lambda: servers_in_turn(work()),
        },
        arguments.rounds,
    )
    middle = {name: median(measured) for name, measured in values.items()}
    publish("sweep", "tokens/s (from start: s)", values, {
        "sweep / engine, 32 λ": middle["sweep"] / middle["engine, 32 λ"],
        "sweep / merges in turn": middle["sweep"] / middle["merges in turn"],
        "seconds, servers in turn / sweep": (
            middle["servers in turn"] / middle["sweep, from start"]
        ),
        "answers for each λ": arguments.questions * arguments.samples,
    })  # fmt: skip


def rows(
    url: str, work: Callable[[], list[PlannedSample]], seeds: "itertools.count[int]"
) -> dict[str, Callable[[], float]]:
    engine = Engine(blended_config(EMBEDDED_PAIR))
    spread = [(index + 0.5) / REQUESTS for index in range(REQUESTS)]
    ready = {value: static_engine(value, BUILD / "embedded" / f"{value}") for value in LAMBDAS}
    return {
        "engine, 32 λ": lambda: speed(engine, EMBEDDED_PAIR, spread, next(seeds)).both,
        "sweep": lambda: swept(url, work()),
        "merges in turn": lambda: in_turn(work(), ready.__getitem__),
    }


def units(questions: int, samples: int, seed: int) -> list[PlannedSample]:
    (curve,) = curves_of(LAMBDAS, ["all"], [0.7], [1.0])
    task = embedded_task(questions, seed)
    return list(planned_samples([(setting, range(samples)) for setting in curve], task.questions))


# --- The sweep -----------------------------------------------------------------------------------


def swept(url: str, work: Iterable[PlannedSample]) -> float:
    return asyncio.run(_swept(url, work))


async def _swept(url: str, work: Iterable[PlannedSample]) -> float:
    asking = RequestOptions(seed=0, max_tokens=MAX_TOKENS, grader=grader_named("embedded"))
    server = ServerClient(url, api_key=None, timeout=600, concurrency=CONCURRENCY)
    with tempfile.TemporaryDirectory() as folder, SampleLog(Path(folder, "samples"), {}) as log:
        async with server:
            pair = await server.pair(None)
            started = time.perf_counter()
            await collect_samples(work, server, pair, asking, log, lambda sample: None)
            seconds = time.perf_counter() - started
        return sum(sample.tokens for sample in log.samples.values()) / seconds


def swept_from_start(work: list[PlannedSample], *flags: str) -> float:
    """Starts a server, runs the sweep, stops the server, and returns the seconds of all that."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, own_server(flags, Path(folder, "server")) as url:
        swept(url, work)
    return time.perf_counter() - started


def servers_in_turn(work: list[PlannedSample]) -> float:
    """Merges, serves and sweeps one λ after another, and returns the seconds of all that.

    Each server has the merged checkpoint as both endpoints, and its requests have λ = 0.
    """
    started = time.perf_counter()
    for value in LAMBDAS:
        own = [
            replace(unit, setting=replace(unit.setting, reasoning_lambda=0.0))
            for unit in work
            if unit.setting.reasoning_lambda == value
        ]
        with tempfile.TemporaryDirectory() as folder:
            merged = write_merged(EMBEDDED_PAIR, value, Path(folder))
            for file in THINKING_DIRECTORY.iterdir():
                if file.suffix != ".safetensors":
                    shutil.copy(file, merged)
            swept_from_start(own, "--instruct", str(merged), "--thinking", str(merged))
    return time.perf_counter() - started


# --- Merged checkpoints in turn ------------------------------------------------------------------


def static_engine(value: float, directory: Path) -> StaticEngine:
    return StaticEngine(
        write_merged(EMBEDDED_PAIR, value, directory), blended_config(EMBEDDED_PAIR)
    )


def in_turn(work: list[PlannedSample], engine_at: Callable[[float], StaticEngine]) -> float:
    prompts = PromptBuilder(
        EndpointText.read(INSTRUCT_DIRECTORY), EndpointText.read(THINKING_DIRECTORY)
    )
    requests = {
        value: [engine_request(unit, prompts) for unit in work
                if unit.setting.reasoning_lambda == value]
        for value in LAMBDAS
    }  # fmt: skip
    tokens = 0
    started = time.perf_counter()
    for value, own in requests.items():
        answers = engine_at(value).generate(own)
        tokens += sum(map(len, answers.values()))
    return tokens / (time.perf_counter() - started)


def engine_request(unit: PlannedSample, prompts: PromptBuilder) -> EngineRequest:
    dial = Dial(unit.setting.reasoning_lambda)
    (message,) = unit.question.messages
    prompt = prompts.build([Message(**message)], dial)
    sampling = SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=unit.setting.decoding.temperature,
        seed=unit.seed(0),
        eos_token_ids=frozenset(prompts.vocabulary.encode("<|im_end|>")),
    )
    return EngineRequest(" ".join(map(str, unit.key)), prompt.token_ids, dial, sampling)


if __name__ == "__main__":
    main()
