"""Runs a step of first contact as a process group, reads its rows as they come, and ends it.

Uses only the standard library, so that it works whatever is broken on a machine. A row is a line of
standard output that begins with `{"subject"`. Everything else, including standard error, goes to
the log as it arrives.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

Row = dict[str, Any]
Status = Literal["ok", "partial", "failed", "timed out", "not run"]
ROW: Final = b'{"subject"'
PATIENCE: Final = 2.0  # seconds between SIGTERM and SIGKILL
READING: Final = 5.0  # seconds at most to read the remaining output of a group that ended
LONGEST_END: Final = 2 * PATIENCE + READING  # seconds, at most, to end a group


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process group ended."""

    status: Status
    seconds: float
    why: str = ""  # if it is not ok


def run_group(
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float,
    log: Path,
    on_row: Callable[[Row], None],
) -> Ended:
    """Runs `command` for at most `limit` seconds, then ends every process of its group.

    Ending them takes at most `LONGEST_END` seconds.
    """
    started = time.monotonic()
    with log.open("ab", buffering=0) as file:
        try:
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        except OSError as error:
            return Ended("failed", time.monotonic() - started, str(error))
        assert child.stdout is not None
        # A grandchild may hold the pipe open forever, so a thread reads it, and is not waited for.
        reader = threading.Thread(target=_read, args=(child.stdout, file, on_row), daemon=True)
        reader.start()
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            return Ended("timed out", time.monotonic() - started, f"after {limit:.0f} s")
        finally:
            end_group(child)
            reader.join(READING)
    why = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    return Ended("failed" if code else "ok", time.monotonic() - started, why if code else "")


def end_group(child: "subprocess.Popen[bytes]") -> None:
    """Ends what is left of the group that `child` leads: first with SIGTERM, then with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        if _is_gone(child, time.monotonic() + PATIENCE):
            return


def _is_gone(child: "subprocess.Popen[bytes]", deadline: float) -> bool:
    while time.monotonic() < deadline:
        child.poll()  # a leader that nobody waits for stays a member of its group
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def _read(source: IO[bytes], log: IO[bytes], on_row: Callable[[Row], None]) -> None:
    with source:
        for line in source:
            row = row_of(line)
            if row is None:
                log.write(line)
            else:
                on_row(row)


def row_of(line: bytes) -> Row | None:
    """Returns the row that a line contains, or None if it is not a row, or not a complete one."""
    if not line.startswith(ROW):
        return None
    try:
        row: Row = json.loads(line)
    except ValueError:
        return None
    return row
