"""Runs `mi-server serve` as a process, with clients in this process."""

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.live_server.streams import ServerFailed, Streamed, StreamRequest

HOST = "127.0.0.1"
STREAMS = 64
STOP_SECONDS = 60.0  # seconds in which an idle server must end
_SERVE = "import sys; from server.cli import main; sys.exit(main(sys.argv[2:], {worker!r}))"


class Server:
    """A server on a free port of the loopback interface, which runs inside its context.

    It is killed if it is not ready after `start_limit` seconds. This process prints the output of
    the server and its engine.
    """

    def __init__(self, *flags: str, stamps: Path | None = None, start_limit: float = 600) -> None:
        self._flags = flags
        self._stamps = stamps
        self._start_limit = start_limit

    def __enter__(self) -> "Server":
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [*self._command(), "--port", "0", "--log-level", "warning", *self._flags],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            self.ready_line = self._line_when_ready()
            self._check_ready()
        except BaseException:
            self._end()
            assert self._process.stdout is not None
            self._process.stdout.close()
            raise
        self.start_seconds = time.perf_counter() - started
        # A full pipe would block the process that writes to it.
        self._rest = threading.Thread(target=self._pass_on, daemon=True)
        self._rest.start()
        return self

    def __exit__(self, *exception: object) -> None:
        code = self._end()
        self._rest.join(STOP_SECONDS)
        if code and exception[0] is None:
            raise ServerFailed(f"the server ended with exit code {code}")

    def _line_when_ready(self) -> str:
        """Returns the server's message when it is ready: its address, and facts of its engine."""
        assert self._process.stdout is not None
        clock = threading.Timer(self._start_limit, self._process.kill)
        clock.start()
        try:
            for line in self._process.stdout:
                if found := re.search(rf"http://{HOST}:(\d+)", line):
                    self.port = int(found[1])
                    return line
        finally:
            clock.cancel()
        raise ServerFailed(f"the server did not start: exit code {self._process.wait()}")

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                print(line, end="", flush=True)

    def _check_ready(self) -> None:
        status, _ = self._get("/ready")
        if status != 200:
            raise ServerFailed(f"/ready says {status}")

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def _end(self) -> int:
        """Terminates the server, or kills it if that takes too long; returns its exit code."""
        self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            self._process.kill()  # no effect if it has ended
            self._process.wait()

    def ways(self) -> dict[str, int]:
        """Returns how many blend groups were computed in each way so far."""
        _, text = self._get("/metrics")
        found = re.findall(r'^mi_layer_executions_total\{.*way="(\w+)"\} (\S+)', text, re.MULTILINE)
        return {way: int(float(count)) for way, count in found}

    def cpu_seconds(self) -> dict[str, float]:
        """Returns the CPU seconds of its two processes so far."""
        http_process = psutil.Process(self._process.pid)
        (engine,) = http_process.children()
        times = {"http": http_process.cpu_times(), "engine": engine.cpu_times()}
        return {name: one.user + one.system for name, one in times.items()}

    async def stream_all(self, requests: Sequence[StreamRequest], key: str = "-") -> list[Streamed]:
        """Streams all requests at once, and returns their answers in order. Raises ServerFailed."""
        return await asyncio.gather(*(self._stream(one, key) for one in requests))

    async def _stream(self, request: StreamRequest, key: str) -> Streamed:
        body = request.body
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
            f"Authorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sent = time.monotonic()
        reader, writer = await asyncio.open_connection(HOST, self.port)
        writer.write(head.encode() + body)
        pieces: list[tuple[float, bytes]] = []
        while piece := await reader.read(1 << 16):
            pieces.append((time.monotonic(), piece))
        writer.close()
        streamed = Streamed(request, sent, tuple(pieces))
        streamed.check()
        return streamed

    def _command(self) -> list[str]:
        if self._stamps is None:
            return [sys.executable, "-m", "server.cli", "serve"]
        stamped = str(Path(__file__).with_name("stamped_worker.py"))
        worker = [sys.executable, stamped, "--stamps", str(self._stamps)]
        return [sys.executable, "-c", _SERVE.format(worker=worker), "-", "serve"]


def refused_seconds(server: Server, headers: dict[str, str], body: Any, status: int) -> list[float]:
    """Returns the seconds from sending to having read the refusal, over one open connection."""
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
