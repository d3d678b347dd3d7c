"""Starts `mi-server serve` as a child process, on a free port of the loopback interface.

The child's standard input is a pipe that nothing is written to. It ends when the parent ends, for
whatever reason, and then the child ends as well. The child is
`python -m server.sweep.own_server FLAGS…`.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from server import serve
from server.exit_codes import ExitCode, exit_code_of
from server.sweep.errors import BadParameters, SweepError

_READY: Final = re.compile(rb"^Ready: .* at (https?://\S+)$", re.MULTILINE)
_POLL_INTERVAL: Final = 0.1  # seconds
_EXIT_TIMEOUT: Final = 30.0  # seconds
FIXED_FLAGS: Final = (
    *("--host", "127.0.0.1", "--port", "0", "--drain-timeout", "0"),
    *("--log-format", "text"),  # in which the ready line is plain text
)
_NOT_INHERITED: Final = (
    *("MI_API_KEY", "MI_API_KEY_FILE", "MI_SSL_CERTFILE", "MI_SSL_KEYFILE"),
    *("MI_RATE_LIMIT_REQUESTS", "MI_RATE_LIMIT_TOKENS", "MI_REQUEST_TIMEOUT"),
)
"""Environment variables for servers with several clients; this one serves only its parent."""


@contextmanager
def own_server(flags: Sequence[str], log: Path) -> Iterator[str]:
    """Yields the URL of a server that runs as long as the context; its output goes to `log`.

    Raises `BadParameters` with the server's message if it refuses its flags or the pair, and
    `SweepError` if it ends otherwise before it is ready.
    """
    command = [sys.executable, "-m", "server.sweep.own_server", "--log-level", "warning"]
    environment = {name: it for name, it in os.environ.items() if name not in _NOT_INHERITED}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *flags, *FIXED_FLAGS],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            process_group=0,  # only the parent gets a terminal's Ctrl-C
        )
    try:
        yield _url(process, log)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        _wait_or_kill(process)


def _url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Waits until the server is ready, and returns its URL."""
    while True:
        found = _READY.search(log.read_bytes())
        if found:
            return found[1].decode()
        try:
            code = process.wait(timeout=_POLL_INTERVAL)
        except subprocess.TimeoutExpired:
            continue
        output = log.read_text(errors="replace").strip()
        if code == ExitCode.UNUSABLE:
            raise BadParameters(f"the server refused to start:\n{output}")
        raise SweepError(f"the server ended with code {code} before it was ready:\n{output}")


def _wait_or_kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(timeout=_EXIT_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return exit_code_of(lambda: serve.main(sys.argv[1:]))


def _end_with_parent() -> None:
    # Not the buffered `sys.stdin`: the interpreter cannot exit while a thread waits in it.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
