"""A server of the command's own: `mi-server serve` on a free port of the loopback.

The child's standard input is a pipe that nothing is written to. Its end is the parent's end,
however that came about, and the child goes as well. Run as `python -m server.sweep.child FLAGS…`.
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
_LOOK_EVERY: Final = 0.1  # seconds
_GOING: Final = 30.0  # seconds that a server may take to end
_FLAGS: Final = (
    *("--host", "127.0.0.1", "--port", "0", "--drain-timeout", "0"),
    *("--log-format", "text"),  # in which it says that it is ready
)
_NOT_INHERITED: Final = (
    *("MI_API_KEY", "MI_API_KEY_FILE", "MI_SSL_CERTFILE", "MI_SSL_KEYFILE"),
    *("MI_RATE_LIMIT_REQUESTS", "MI_RATE_LIMIT_TOKENS", "MI_REQUEST_TIMEOUT"),
)
"""Of the environment, what is for servers with clients; this one has a single one, its parent."""


@contextmanager
def own_server(flags: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a server that lives as long as the context; what it prints goes to `log`.

    Raises `BadParameters` with its message where it refuses its flags or the pair.
    """
    command = [sys.executable, "-m", "server.sweep.child", "--log-level", "warning"]
    environment = {name: it for name, it in os.environ.items() if name not in _NOT_INHERITED}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *flags, *_FLAGS],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            process_group=0,  # a terminal's Ctrl-C is for the parent
        )
    try:
        yield _url(process, log)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        _reap(process)


def _url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Waits as long as the pair takes to load."""
    while True:
        found = _READY.search(log.read_bytes())
        if found:
            return found[1].decode()
        try:
            code = process.wait(timeout=_LOOK_EVERY)
        except subprocess.TimeoutExpired:
            continue
        told = log.read_text(errors="replace").strip()
        if code == ExitCode.UNUSABLE:
            raise BadParameters(f"the server refused to start:\n{told}")
        raise SweepError(f"the server ended with code {code} before it was ready:\n{told}")


def _reap(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(timeout=_GOING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    return exit_code_of(lambda: serve.main(sys.argv[1:]))


def _leave_with_parent() -> None:
    # Not the buffered `sys.stdin`: the interpreter cannot end while a thread waits in that.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
