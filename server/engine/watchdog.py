"""Decides whether an engine hangs: it has work, and several checks in a row saw no progress.

It counts checks and not seconds: a server process that was itself stopped for an hour sees one
check without progress, and not an hour of silence. The engine client checks at regular times.
"""

from dataclasses import dataclass
from typing import Final

CHECKS: Final = 4  # in the time that an engine may be silent (--engine-timeout)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counts the messages between the two processes so far."""

    received: int = 0  # reports from the engine
    queued: int = 0  # commands to the engine
    sent: int = 0  # of these, those that were written to the pipe

    def has_progress_since(self, before: "Traffic") -> bool:
        """Whether the engine reported something and no command is stuck at a full pipe."""
        unread = self.queued > self.sent == before.sent
        return self.received > before.received and not unread


class Watchdog:
    """Watches an engine for as long as it has work."""

    def __init__(self, traffic: Traffic) -> None:
        self._last = traffic
        self._silent = 0

    def check(self, traffic: Traffic) -> bool:
        """Checks once more. Returns whether the engine hangs."""
        self._silent = 0 if traffic.has_progress_since(self._last) else self._silent + 1
        self._last = traffic
        return self._silent > CHECKS  # the first may have come right after the last progress
