"""`mi-server serve` on the embedded pair as a process, and clients of it in this one."""

import asyncio
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.workload import NEW_TOKENS
from mi_runtime.embedded_pair.task import draw_questions

HOST = "127.0.0.1"
STREAMS = 64
_SERVE = "import sys; from server.cli import main; sys.exit(main(sys.argv[2:], {worker!r}))"


@dataclass(frozen=True, slots=True)
class Asked:
    """One stream: what it asks, and the seed that names it."""

    text: str
    reasoning_lambda: float
    seed: int

    @property
    def body(self) -> bytes:
        """A greedy answer of exactly `NEW_TOKENS` tokens, streamed."""
        fields = {
            "model": "mi-embedded",
            "messages": [{"role": "user", "content": self.text}],
            "reasoning_lambda": self.reasoning_lambda,
            "seed": self.seed,
            "max_tokens": NEW_TOKENS,
            "min_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(fields).encode()


def workload(seed: int, *, lambdas: Sequence[float]) -> list[Asked]:
    """Questions of the embedded pair's task, each with its λ."""
    questions = draw_questions(random.Random(seed), len(lambdas))
    return [
        Asked(question.text, round(value, 2), seed=seed * len(lambdas) + index)
        for index, (question, value) in enumerate(zip(questions, lambdas, strict=True))
    ]


class Server:
    """Listens on a free port of the loopback for as long as the context lasts."""

    def __init__(self, *flags: str, stamps: Path | None = None) -> None:
        self._flags = flags
        self._stamps = stamps

    def __enter__(self) -> "Server":
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [*self._command(), "--port", "0", "--log-level", "warning", *self._flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:  # it says so when it is ready
            found = re.search(rf"http://{HOST}:(\d+)", line)
            if found:
                self.port = int(found[1])
                break
        else:
            raise RuntimeError("the server did not start")
        connection = http.client.HTTPConnection(HOST, self.port)
        connection.request("GET", "/ready")
        assert connection.getresponse().status == 200
        self.start_seconds = time.perf_counter() - started
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=60)

    async def stream_all(self, asked: Sequence[Asked], key: str = "-") -> dict[int, list[float]]:
        """All of them at once; the moments their tokens were read, by the seed of each."""
        arrivals = await asyncio.gather(*(self._stream(one, key) for one in asked))
        return {one.seed: moments for one, moments in zip(asked, arrivals, strict=True)}

    async def _stream(self, asked: Asked, key: str) -> list[float]:
        body = asked.body
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
            f"Authorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(HOST, self.port)
        writer.write(head.encode() + body)
        pieces: list[tuple[float, bytes]] = []
        while piece := await reader.read(1 << 16):
            pieces.append((time.monotonic(), piece))
        writer.close()
        answer = b"".join(piece for _, piece in pieces)
        usage: list[str] = re.findall(r'"completion_tokens": ?(\d+)', answer.decode())
        assert b"[DONE]" in answer, answer[-500:]
        assert int(usage[-1]) == NEW_TOKENS
        # A token's event is sent in one piece, and a piece is hardly ever read in two.
        return [at for at, piece in pieces for _ in range(piece.count(b'"delta":{"content":'))]

    def _command(self) -> list[str]:
        if self._stamps is None:
            return [sys.executable, "-m", "server.cli", "serve"]
        stamped = str(Path(__file__).with_name("stamped_worker.py"))
        worker = [sys.executable, stamped, "--stamps", str(self._stamps)]
        return [sys.executable, "-c", _SERVE.format(worker=worker), "-", "serve"]


def refused_seconds(server: Server, headers: dict[str, str], body: Any, status: int) -> list[float]:
    """Seconds from sending to having read the refusal, over one open connection."""
    connection = http.client.HTTPConnection(HOST, server.port)
    content = json.dumps(body).encode()
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", content, headers)
        response = connection.getresponse()
        response.read()
        seconds.append(time.perf_counter() - started)
        assert response.status == status
    connection.close()
    return seconds
