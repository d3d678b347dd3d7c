"""HTTP and streaming against the engine alone: the same 64 requests, 64 λ values, 128 new tokens.

    python -m bench.serving [--rounds N]

The engine row runs in this process, with as many threads as the server's engine process takes by
itself. The HTTP row starts `mi-server serve` on the embedded pair and reads 64 streams at once from
this process, so that on two cores client, HTTP and engine share them. Prompts are the same token
ids. Also prints the time from start to `/ready`.
"""

import argparse
import asyncio
import itertools
import time
from statistics import median

import torch

from bench.report import interleaved, publish
from bench.served import STREAMS, Server, workload
from bench.workload import EMBEDDED, NEW_TOKENS
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.engine import Engine
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.worker import default_threads
from server.checkpoint import Endpoint
from server.prompt import Prompts
from server.schemas import Message

LAMBDAS = [index / (STREAMS - 1) for index in range(STREAMS)]
TURN_END = 317  # in the embedded pair's vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(default_threads())

    engine = Engine(EMBEDDED)
    with Server("--no-prefix-caching") as server:
        seeds = itertools.count()
        values = interleaved(
            {
                "engine alone": lambda: engine_alone(engine, next(seeds)),
                f"HTTP, {STREAMS} streams": lambda: streamed(server, next(seeds)),
            },
            arguments.rounds,
        )
        alone, served = (median(measured) for measured in values.values())
        publish("serving", "tokens/s", values, {
            "HTTP / engine alone": served / alone,
            "seconds from start to ready": server.start_seconds,
        })  # fmt: skip


def engine_alone(engine: Engine, seed: int) -> float:
    prompts = Prompts(Endpoint.read(INSTRUCT_DIRECTORY), Endpoint.read(THINKING_DIRECTORY))
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS,
        min_tokens=NEW_TOKENS,
        temperature=0.0,
        eos_token_ids=frozenset({TURN_END}),
    )
    requests = []
    for asked in workload(seed, lambdas=LAMBDAS):
        dial = Dial.on_grid(asked.reasoning_lambda, 0.01)
        prompt = prompts.build([Message(role="user", content=asked.text)], dial)
        requests.append(EngineRequest(f"{asked.seed}", prompt.token_ids, dial, sampling))
    started = time.perf_counter()
    events = engine.generate(requests)
    assert sum(map(len, events.values())) == STREAMS * NEW_TOKENS
    return STREAMS * NEW_TOKENS / (time.perf_counter() - started)


def streamed(server: Server, seed: int) -> float:
    """Tokens a second over all streams, from the first request's start to the last's end."""
    started = time.perf_counter()
    asyncio.run(server.stream_all(workload(seed, lambdas=LAMBDAS)))
    return STREAMS * NEW_TOKENS / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
