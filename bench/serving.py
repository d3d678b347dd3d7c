"""Compares streaming over HTTP with the engine alone, at 64 requests of 64 different λ.

    python -m bench.serving [--rounds N]

Each answer has 128 tokens, and the prompts of both rows are the same token ids. The engine row runs
in this process, with as many threads as the server's engine process uses by default. The HTTP row
starts `mi-server serve` on the embedded pair and reads 64 streams at once in this process, so that
client, HTTP process and engine share the cores. It also prints the time from start to `/ready`.
"""

import argparse
import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from bench.live_server.server_process import Server
from bench.live_server.streams import STREAMS, Streamed, StreamRequest, stream_requests
from bench.measuring.publishing import interleaved, publish
from bench.models.workloads import EMBEDDED
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.engine import Engine
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.worker import default_threads
from server.text.checkpoint import EndpointText
from server.text.prompt import PromptBuilder
from server.wire.messages import Message

LAMBDAS = [index / (STREAMS - 1) for index in range(STREAMS)]


@dataclass(frozen=True, slots=True)
class Answered:
    """The time of one round, and its answers in the order of the requests."""

    seconds: float
    texts: list[str]
    streams: tuple[Streamed, ...] = ()  # over HTTP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(default_threads())

    alone = EngineAlone(Engine(EMBEDDED), INSTRUCT_DIRECTORY, THINKING_DIRECTORY)
    with Server("--no-prefix-caching") as server:
        seeds = itertools.count()

        def tokens_a_second(answer: Callable[[list[StreamRequest]], Answered]) -> float:
            requests = stream_requests(next(seeds), lambdas=LAMBDAS)
            return sum(one.new_tokens for one in requests) / answer(requests).seconds

        values = interleaved(
            {
                "engine alone": lambda: tokens_a_second(alone.answer),
                f"HTTP, {STREAMS} streams": lambda: tokens_a_second(partial(over_http, server)),
            },
            arguments.rounds,
        )
        by_itself, served = (median(measured) for measured in values.values())
        publish("serving", "tokens/s", values, {
            "HTTP / engine alone": served / by_itself,
            "seconds from start to ready": server.start_seconds,
        })  # fmt: skip


class EngineAlone:
    """An engine in this process, which gets the token ids that the server would make."""

    def __init__(self, engine: Engine, instruct: Path, thinking: Path) -> None:
        self._engine = engine
        self.info = engine.info
        endpoints = EndpointText.read(instruct), EndpointText.read(thinking)
        self._prompts = PromptBuilder(*endpoints)
        self._ends = frozenset().union(*(endpoint.eos_token_ids for endpoint in endpoints))

    def answer(self, requests: Sequence[StreamRequest]) -> Answered:
        engine_requests = [self._request(one) for one in requests]
        started = time.perf_counter()
        events = self._engine.generate(engine_requests)
        seconds = time.perf_counter() - started
        tokens_of = [
            [event.token_id for event in events[it.request_id] if event.token_id is not None]
            for it in engine_requests
        ]
        assert [len(tokens) for tokens in tokens_of] == [one.new_tokens for one in requests]
        return Answered(seconds, [self._prompts.vocabulary.decode(tokens) for tokens in tokens_of])

    def _request(self, request: StreamRequest) -> EngineRequest:
        dial = Dial.on_grid(request.reasoning_lambda, 0.01)
        prompt = self._prompts.build([Message(role="user", content=request.text)], dial)
        sampling = SamplingParams(
            max_tokens=request.new_tokens,
            min_tokens=request.new_tokens,
            temperature=0.0,
            eos_token_ids=self._ends,
        )
        return EngineRequest(f"{request.seed}", prompt.token_ids, dial, sampling)


def over_http(
    server: Server, requests: Sequence[StreamRequest], limit: float | None = None
) -> Answered:
    """Reads all streams at once, and times them from the first one's start to the last one's end.

    Raises `ServerFailed`, and TimeoutError if they take longer than `limit` seconds.
    """

    async def read() -> list[Streamed]:
        async with asyncio.timeout(limit):
            return await server.stream_all(requests)

    started = time.perf_counter()
    streams = asyncio.run(read())
    seconds = time.perf_counter() - started
    return Answered(seconds, [one.text for one in streams], tuple(streams))


if __name__ == "__main__":
    main()
