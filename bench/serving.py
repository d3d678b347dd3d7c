"""HTTP and streaming against the engine alone: the same 32 requests, 32 λ values, 128 new tokens.

    python -m bench.serving [--rounds N]

The engine row runs in this process, with as many threads as the server's engine process takes by
itself. The HTTP row starts `mi-server serve` on the embedded pair and reads 32 streams at once from
this process, so that on two cores client, HTTP and engine share them. Prompts are the same token
ids. Also prints the time from start to `/ready`.
"""

import argparse
import asyncio
import http.client
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from statistics import median

import torch

from bench.report import interleaved, publish
from bench.workload import EMBEDDED, NEW_TOKENS, REQUESTS, SAMPLING
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.embedded_pair.task import draw_questions
from mi_runtime.engine import Engine
from mi_runtime.request import Dial, EngineRequest
from mi_runtime.worker import default_threads
from server.checkpoint import Endpoint
from server.prompt import Prompts
from server.schemas import Message

HOST = "127.0.0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(default_threads())

    engine = Engine(EMBEDDED)
    with Server() as server:
        seeds = itertools.count()
        values = interleaved(
            {
                "engine alone": lambda: engine_alone(engine, next(seeds)),
                "HTTP, 32 streams": lambda: asyncio.run(server.stream_all(next(seeds))),
            },
            arguments.rounds,
        )
        alone, streamed = (median(measured) for measured in values.values())
        publish("serving", "tokens/s", values, {
            "HTTP / engine alone": streamed / alone,
            "seconds from start to ready": server.start_seconds,
        })  # fmt: skip


def workload(seed: int) -> list[tuple[str, float]]:
    """Questions of the embedded pair's task, each with its λ."""
    draw = random.Random(seed)
    questions = draw_questions(draw, REQUESTS)
    return [(one.text, index / (REQUESTS - 1)) for index, one in enumerate(questions)]


def engine_alone(engine: Engine, seed: int) -> float:
    prompts = Prompts(Endpoint.read(INSTRUCT_DIRECTORY), Endpoint.read(THINKING_DIRECTORY))
    requests = []
    for index, (text, value) in enumerate(workload(seed)):
        dial = Dial.on_grid(value, 0.01)
        prompt = prompts.build([Message(role="user", content=text)], dial)
        requests.append(EngineRequest(f"{seed}-{index}", prompt.token_ids, dial, SAMPLING))
    started = time.perf_counter()
    events = engine.generate(requests)
    assert sum(map(len, events.values())) == REQUESTS * NEW_TOKENS
    return REQUESTS * NEW_TOKENS / (time.perf_counter() - started)


class Server:
    """`mi-server serve` on a free port of the loopback, for as long as the context lasts."""

    def __enter__(self) -> "Server":
        started = time.perf_counter()
        command = [sys.executable, "-m", "server.cli", "serve", "--port", "0"]
        self._process = subprocess.Popen(
            [*command, "--no-prefix-caching", "--log-level", "warning"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:  # it says so when it is ready
            found = re.search(rf"http://{HOST}:(\d+)", line)
            if found:
                self._port = int(found[1])
                break
        else:
            raise RuntimeError("the server did not start")
        connection = http.client.HTTPConnection(HOST, self._port)
        connection.request("GET", "/ready")
        assert connection.getresponse().status == 200
        self.start_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=60)

    async def stream_all(self, seed: int) -> float:
        """Tokens a second over all streams, from the first request's start to the last's end."""
        started = time.perf_counter()
        counts = await asyncio.gather(*(self._stream(*one) for one in workload(seed)))
        assert counts == [NEW_TOKENS] * REQUESTS
        return REQUESTS * NEW_TOKENS / (time.perf_counter() - started)

    async def _stream(self, text: str, value: float) -> int:
        body = json.dumps(
            {
                "model": "mi-embedded",
                "messages": [{"role": "user", "content": text}],
                "reasoning_lambda": round(value, 2),
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(HOST, self._port)
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        usage: list[str] = re.findall(r'"completion_tokens": ?(\d+)', answer.decode())
        assert b"[DONE]" in answer, answer[-500:]
        return int(usage[-1])


if __name__ == "__main__":
    main()
