"""Processes that start at once, as they are forked from one that has imported what they need.

To import what the server needs takes a second or two, and for the engine, with torch and
transformers, six. `tests/contract/conftest.py` also starts real servers by their command.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["server.cli", "server.service", "server.api.uvicorn_server", "mi_runtime.worker"]
)


class ForkedProcess:
    """A process that runs `main(*arguments)` and ends with its result; used like a `Popen`.

    Its output goes to the file `log`.
    """

    def __init__(self, main: Callable[..., int], *arguments: Any, log: Path) -> None:
        log.touch()
        self._process = FORKSERVER.Process(target=_run, args=(main, arguments, log), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired([], timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(main: Callable[..., int], arguments: Sequence[Any], log: Path) -> NoReturn:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    sys.exit(main(*arguments))
