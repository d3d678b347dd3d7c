"""Compares a complete server over HTTP with the engine alone, on a random pair of real shapes.

    python -m bench.gpu.http_rows [--model NAME] [--seconds 90] [--compile] [--out DIR]
    python -m bench.gpu.http_rows --smoke      tiny shapes, in fp32 if there is no GPU

Prints a line of JSON for each of these, in this order:

    start           makes the pair and writes it as checkpoints (into memory, if they fit), and
                    starts `mi-server serve` on them as a process, up to its `/ready`
    HTTP            64 greedy streams of exactly 256 tokens, read by this process: at 64 different
                    λ, and at one; with the seconds to the first token and between tokens, the rate
                    once all streams run, and the cores that each process used
    start, engine   starts an engine in this process with the same settings, on the pair in memory
    … in turn       rounds of both, HTTP and the engine alone, at the same token ids; their ratio
                    has a target; and how many answers are equal to the last token

Server and engine are in memory at once, each with the KV and blended weights that it needs and no
more. `--seconds` limits the rounds. Starting is not limited, and each kind runs at least two
rounds: a warm-up, which is not counted, and one more. Steps are captured as they run; `--compile`
compiles them, which makes both starts longer. A pair whose files do not fit anywhere is skipped;
`--layers` cuts it.

The exit code is 1 if anything failed or the pair was skipped. It is also 1 if, on a GPU, the
server's engine or the one here runs without CUDA graphs or without kernels; it is measured all
the same.
"""

import argparse
import itertools
import math
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final, Literal

import torch

from bench.engine import HOT
from bench.gpu.cases import Row, Run, message_of, off
from bench.gpu.report import Report
from bench.live_server.server_process import Server
from bench.live_server.streams import Streamed, StreamRequest, stream_requests
from bench.measuring.arguments import at_least, made_folder
from bench.measuring.device import synchronize
from bench.measuring.folders import BUILD, RESULTS
from bench.models.pair_on_disk import (
    WrittenPair,
    bytes_of_pair,
    drop_weights,
    folder_with_room,
    write_pair,
)
from bench.models.random_pair import Place
from bench.models.shapes import SHAPES, TINY, Shape
from bench.serving import Answered, EngineAlone, over_http
from mi_runtime.engine import Engine
from mi_runtime.model.load import pair_up
from mi_runtime.request import EngineInfo
from mi_runtime.worker import default_threads
from server.config import load_settings

NAME: Final = "random"  # name of the model in requests
ROUNDS: Final = 5  # rounds of both in turn, at most
FIRST_ROUNDS: Final = 2  # rounds of HTTP alone
LONGEST_ROUND: Final = 120.0  # seconds after which streams count as hung
START_LIMIT: Final = 600.0  # seconds, including compiled steps
BLEND_ROOM: Final = 1.5  # copies of the model: room for one λ and its CUDA graphs

Lambdas = Literal["different", "one"]
KINDS: Final[tuple[Lambdas, ...]] = ("different", "one")


@dataclass(frozen=True, slots=True)
class Streams:
    """The size of a round, which is the same over HTTP and for the engine alone."""

    count: int = 64
    new_tokens: int = 256  # several seconds, so that the reading of 64 requests is a small part
    context: int = 384  # tokens of a prompt and its answer, at most
    rounds: int = ROUNDS


FEW: Final = Streams(count=6, new_tokens=24, context=96, rounds=1)


@dataclass(frozen=True, slots=True)
class ServedRun(Run):
    """The model that is served, and the size of a round."""

    layers: int | None = None  # None: all

    @property
    def shape(self) -> Shape:
        shape = (TINY if self.smoke else SHAPES)[self.model]
        return replace(shape, layers=self.layers or shape.layers)

    @property
    def streams(self) -> Streams:
        return FEW if self.smoke else Streams()

    @property
    def place(self) -> Place:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return Place(device, dtype, positions=self.streams.context)

    def flags(self, pair: WrittenPair) -> list[str]:
        """Returns flags of `mi-server serve` that give it no more memory than the streams need."""
        streams, (instruct, thinking) = self.streams, pair.directories
        settings = {
            "instruct": instruct,
            "thinking": thinking,
            "device": self.place.device.type,
            "served-model-name": NAME,
            "max-num-seqs": streams.count,
            "cuda-graph-sizes": streams.count,  # the others would only be captured
            "max-model-len": streams.context,
            "num-blocks": streams.count * math.ceil(streams.context / 16),
            "blend-cache-bytes": int(BLEND_ROOM * pair.bytes / 2),
        }
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        flags.append("--no-prefix-caching")
        return flags if self.compiled else [*flags, "--no-torch-compile"]

    def lambdas(self, kind: Lambdas) -> list[float]:
        if kind == "one":
            return [HOT] * self.streams.count
        return [index / (self.streams.count - 1) for index in range(self.streams.count)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="4b", help="its shapes (4b)")
    parser.add_argument("--layers", type=at_least(1), help="number of layers of the model (all)")
    parser.add_argument("--seconds", type=float, default=90, help="seconds for the rounds (90)")
    places = f"bench/results; with --smoke {BUILD}"
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of the JSON ({places})")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any device")
    parser.add_argument("--compile", action="store_true", help="captured steps compiled")
    chosen = parser.parse_args(arguments)
    run = ServedRun(chosen.model, chosen.smoke, chosen.compile, chosen.layers)
    if not run.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --smoke runs tiny shapes on a CPU")
    folder = made_folder(parser, chosen.out or (BUILD if run.smoke else RESULTS))
    started = time.monotonic()
    report = Report(run, ["served"], folder)
    for record in rows_of(run, chosen.seconds):
        report.add(record)
    report.finish(time.monotonic() - started)
    return int(report.failed)


def rows_of(run: ServedRun, seconds: float) -> Iterator[Row]:
    """Yields the rows. A failure becomes a row that reports it, and is the last one."""
    try:
        size = bytes_of_pair(run.shape, run.place.dtype)
        folder = folder_with_room(size)
        if folder is None:
            why = f"no room for files of {size / 1e9:.0f} GB; --layers cuts them"
            yield row("start", skipped=why)
            return
        with tempfile.TemporaryDirectory(prefix="mi-served-", dir=folder) as directory:
            pair = write_pair(run.shape, run.place, Path(directory))
            yield from measured_rows(run, pair, seconds)
    except Exception as error:
        yield row("failed", error=message_of(error))


def measured_rows(run: ServedRun, pair: WrittenPair, seconds: float) -> Iterator[Row]:
    made, written = f"{pair.seconds_made:.1f} s", f"{pair.seconds_written:.1f} s"
    print(f"{pair.bytes / 1e9:.2f} GB made in {made}, written in {written}", flush=True)
    flags, before = run.flags(pair), free_memory(run)
    with Server(*flags, start_limit=START_LIMIT) as server:
        yield started_row(run, pair, server, before - free_memory(run))
        drop_weights(pair)
        rounds = Rounds(run, server, seconds)
        for kind in KINDS:
            yield rounds.over_http(kind)
        started = time.perf_counter()
        alone = engine_alone(run, pair, flags)
        engine = engine_facts(alone.info)
        facts = {"seconds": time.perf_counter() - started, "engine": engine}
        yield row("start, engine alone", facts=facts, **off(engine, run, run.place.device.type))
        yield from rounds.in_turn("different", alone, share=1 / 2)
        yield from rounds.in_turn("one", alone, share=1)


def started_row(run: ServedRun, pair: WrittenPair, server: Server, device_bytes: int) -> Row:
    engine = engine_facts_of(server.ready_line)
    facts = {
        "folder": str(Path(pair.directories[0]).parent),
        "bytes": pair.bytes,
        "seconds_made": pair.seconds_made,
        "seconds_written": pair.seconds_written,
        "seconds_to_ready": server.start_seconds,
        "device_bytes": device_bytes,
        "layers": run.shape.layers,
        "engine": engine,
    }
    return row("start", facts=facts, **off(engine, run, run.place.device.type))


def row(what: str, run: ServedRun | None = None, kind: Lambdas = "one", **values: Any) -> Row:
    """Returns a row as the report takes it. A measured row has the sizes of `run`."""
    sizes = {"sequences": 0, "tokens": 0}
    if run is not None:
        sizes = {"sequences": run.streams.count, "tokens": run.streams.new_tokens}
    return {"subject": "served", "what": what, "lambdas": kind, **sizes, **values}


# --- The engines ----------------------------------------------------------------------------------


def engine_alone(run: ServedRun, pair: WrittenPair, flags: list[str]) -> EngineAlone:
    """Makes an engine with the same flags as the server's. It takes over the pair's models."""
    instruct, thinking = pair.directories
    config = load_settings(flags).engine_config(instruct=instruct, thinking=thinking)
    model = pair_up(pair.instruct, pair.thinking, NAME)
    return EngineAlone(Engine(config, model), *pair.directories)


def engine_facts_of(ready_line: str) -> dict[str, str]:
    """Returns what the server's start message reports of the engine's choices."""
    patterns = {"attention": "attention", "pair_kernels": "pair kernels", "graphs": "CUDA graphs:"}
    found = {name: re.search(rf"; {word} (.*?); ", ready_line) for name, word in patterns.items()}
    return {name: match[1] if match else "none" for name, match in found.items()}


def engine_facts(info: EngineInfo) -> dict[str, str]:
    kernels = info.pair_kernels or "none"
    return {"attention": info.attention, "pair_kernels": kernels, "graphs": info.graphs}


def free_memory(run: ServedRun) -> int:
    """Returns the free bytes of the GPU, or 0 without one."""
    device = run.place.device
    synchronize(device)
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


# --- Rounds ---------------------------------------------------------------------------------------


class Rounds:
    """Runs the rounds; no two of them have the same requests."""

    def __init__(self, run: ServedRun, server: Server, seconds: float) -> None:
        self._run, self._server, self._left = run, server, seconds
        self._seeds = itertools.count()

    def over_http(self, kind: Lambdas) -> Row:
        """Measures HTTP alone in few rounds, so that there is a row early."""
        executions, cpu = self._server.ways(), self._cpu_seconds()
        ways = {"HTTP": self._streamed}
        served = self._measured(kind, ways, FIRST_ROUNDS, self._left)["HTTP"]
        taken = {name: now - cpu[name] for name, now in self._cpu_seconds().items()}
        seconds = taken.pop("wall")
        facts = latencies([stream for answered in served for stream in answered.streams])
        facts |= rate_of(served)
        facts["ways"] = {way: now - executions[way] for way, now in self._server.ways().items()}
        facts["cores"] = {name: one / seconds for name, one in taken.items()}
        return self._row("HTTP", kind, served, **facts)

    def in_turn(self, kind: Lambdas, alone: EngineAlone, share: float) -> Iterator[Row]:
        """Measures HTTP and the engine alone in turn, in a share of the time that is left."""
        ways = {"HTTP": self._streamed, "engine alone": alone.answer}
        most, seconds = self._run.streams.rounds, self._left * share
        served, by_itself = self._measured(kind, ways, most, seconds).values()
        equal = [
            one == other
            for over_http, directly in zip(served, by_itself, strict=True)
            for one, other in zip(over_http.texts, directly.texts, strict=True)
        ]
        facts = {"answers": len(equal), "same_answers": sum(equal), **rate_of(served)}
        yield self._row("HTTP in turn", kind, served, **facts)
        yield self._row("engine in turn", kind, by_itself)

    def _measured(
        self,
        kind: Lambdas,
        ways: Mapping[str, Callable[[list[StreamRequest]], Answered]],
        most: int,
        seconds: float,
    ) -> dict[str, list[Answered]]:
        """Runs rounds in which all `ways` answer the same requests in turn.

        After a warm-up it runs at least one round, and as many as there is time for up to `most`.
        """
        began = time.monotonic()
        measured: dict[str, list[Answered]] = {name: [] for name in ways}
        for index in range(most + 1):
            if index > 1 and time.monotonic() - began > seconds:
                break
            requests = self._requests(kind)
            for name, answer in ways.items():
                answered = answer(requests)
                measured[name] += [answered] if index else []
                rate = self._tokens / answered.seconds
                print(f"round {index}  {kind} λ  {name:<13} {rate:>9,.1f} tokens/s", flush=True)
        self._left -= time.monotonic() - began
        return measured

    def _cpu_seconds(self) -> dict[str, float]:
        """Returns the CPU seconds of each process, and those of the clock."""
        own = {"client": time.process_time(), "wall": time.monotonic()}
        return self._server.cpu_seconds() | own

    def _requests(self, kind: Lambdas) -> list[StreamRequest]:
        return stream_requests(
            next(self._seeds),
            lambdas=self._run.lambdas(kind),
            model=NAME,
            new_tokens=self._run.streams.new_tokens,
        )

    def _streamed(self, requests: list[StreamRequest]) -> Answered:
        return over_http(self._server, requests, limit=LONGEST_ROUND)

    def _row(self, what: str, kind: Lambdas, rounds: list[Answered], **facts: Any) -> Row:
        seconds = [answered.seconds for answered in rounds]
        return row(
            what,
            self._run,
            kind,
            seconds=median(seconds),
            lowest=min(seconds),
            highest=max(seconds),
            rounds=len(seconds),
            tokens_a_second=self._tokens / median(seconds),
            facts=facts,
        )

    @property
    def _tokens(self) -> int:
        """Tokens of a round."""
        return self._run.streams.count * self._run.streams.new_tokens


def latencies(streams: list[Streamed]) -> dict[str, Any]:
    """Returns quantiles of the seconds to the first token and between tokens, and counts of events.

    There should be one event for each token.
    """
    moments = [stream.moments for stream in streams]
    first = [one[0] - stream.sent for one, stream in zip(moments, streams, strict=True)]
    between = [later - at for one in moments for at, later in itertools.pairwise(one)]
    return {
        "first_token": middle_and_tail(first),
        "between_tokens": middle_and_tail(between),
        "events": sum(map(len, moments)),
        "tokens": sum(stream.request.new_tokens for stream in streams),
    }


def rate_of(served: list[Answered]) -> dict[str, float]:
    return {"steady_tokens_a_second": median(steady(answered.streams) for answered in served)}


def steady(streams: Sequence[Streamed]) -> float:
    """Returns the tokens a second while all streams run.

    That is from the first token of the last stream to start to the last token of the first one to
    end, which leaves out the reading of so many requests at once.
    """
    moments = [stream.moments for stream in streams]
    start, end = max(one[0] for one in moments), min(one[-1] for one in moments)
    read = sum(start < at <= end for one in moments for at in one)
    return read / (end - start) if end > start else 0.0


def middle_and_tail(seconds: list[float]) -> dict[str, float]:
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


if __name__ == "__main__":
    # Whatever ends this process also removes its files and ends its server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(default_threads())
    sys.exit(main())
