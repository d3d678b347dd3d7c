"""Starts server processes for the tests: on the embedded pair, or on the fake engine."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from mi_runtime.embedded_pair.tokenizer import save_tokenizer
from server.cli import main
from tests.forked import ForkedProcess

ROOT = Path(__file__).parents[2]
FAKE_WORKER = ROOT / "tests" / "server" / "fake_worker.py"
FLAGS = ("--port", "0", "--served-model-name", "pair")
READY = re.compile(r"^Ready: .* at (http://\S+)$", re.MULTILINE)


class ServerProcess:
    """Runs a server on a free port, which is read from its output file."""

    def __init__(self, process: "subprocess.Popen[bytes] | ForkedProcess", log: Path) -> None:
        self.process = process
        self.log = log

    @classmethod
    def of_embedded_pair(cls, log: Path, *flags: str) -> "ServerProcess":
        """Starts `mi-server serve` on the embedded pair."""
        command = [sys.executable, "-m", "server.cli", "serve", *FLAGS, *flags]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MI_")}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        return cls(process, log)

    @classmethod
    def of_fake_engine(
        cls,
        log: Path,
        pair: Path,
        *flags: str,
        worker: Sequence[str] = (),
        thinking: Path | None = None,
    ) -> "ServerProcess":
        """Starts a server on the fake engine, with the tokenizer and templates of `pair`."""
        directories = ["--instruct", str(pair), "--thinking", str(thinking or pair)]
        command = [sys.executable, str(FAKE_WORKER), *worker]
        process = ForkedProcess(main, ["serve", *FLAGS, *directories, *flags], command, log=log)
        return cls(process, log)

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def wait_ready(self) -> "ServerProcess":
        wait_until(lambda: READY.search(self.output) or self.process.poll() is not None, 120)
        match = READY.search(self.output)
        assert match is not None, self.output
        self.url = match[1]
        return self

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def gauge(self, name: str) -> float:
        match = re.search(rf"^{name}{{.*}} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert match is not None
        return float(match[1])

    def is_idle(self) -> bool:
        gauges = ("mi_num_requests_running", "mi_num_requests_waiting", "mi_kv_cache_usage_ratio")
        return all(self.gauge(name) == 0 for name in gauges)

    def chat_body(self, content: str, **fields: Any) -> dict[str, Any]:
        return {"model": "pair", "messages": [{"role": "user", "content": content}]} | fields

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        return self.process.wait(timeout=60)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.terminate()
            try:
                self.exit_code()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


WaitUntil = Callable[..., None]
StartFake = Callable[..., ServerProcess]


@pytest.fixture(scope="session", name="wait_until")
def _wait_until() -> WaitUntil:
    return wait_until


@pytest.fixture(scope="session")
def pair_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint that has everything but weights."""
    directory = tmp_path_factory.mktemp("pair")
    save_tokenizer(directory)
    return directory


@pytest.fixture
def start_fake(pair_directory: Path, tmp_path: Path) -> Iterator[StartFake]:
    """Starts servers on the fake engine: `start_fake("--drain-timeout", "1", worker=[…])`."""
    started: list[ServerProcess] = []

    def start(
        *flags: str,
        worker: Sequence[str] = (),
        thinking: Path = pair_directory,
        wait: bool = True,
    ) -> ServerProcess:
        log = tmp_path / f"server{len(started)}.log"
        server = ServerProcess.of_fake_engine(
            log, pair_directory, *flags, worker=worker, thinking=thinking
        )
        started.append(server)
        return server.wait_ready() if wait else server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def shared_fake_server(
    pair_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("fake") / "server.log"
    server = ServerProcess.of_fake_engine(log, pair_directory, "--keep-alive", "0.1")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def fake_server(shared_fake_server: ServerProcess) -> Iterator[ServerProcess]:
    """Returns the shared server on the fake engine, and waits until the test has left it idle."""
    yield shared_fake_server
    wait_until(shared_fake_server.is_idle)


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Starts a server on the embedded pair, shared by all tests that need no flags."""
    log = tmp_path_factory.mktemp("real") / "server.log"
    server = ServerProcess.of_embedded_pair(log)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def client(real_server: ServerProcess) -> Iterator[openai.OpenAI]:
    """Gives an official client of the real server, which does not retry."""
    with openai.OpenAI(
        base_url=f"{real_server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client
