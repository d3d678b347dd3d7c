"""When an engine counts as hung: it owes answers, and between several looks nothing moved.

Looks are counted, not seconds: a server process that was itself stopped for an hour sees one look
without news, not an hour of silence. Knows no clock; the engine client looks at even times.
"""

from dataclasses import dataclass
from typing import Final

LOOKS: Final = 4  # in the time that an engine may be silent


@dataclass(frozen=True, slots=True)
class Traffic:
    """Messages so far between the two processes."""

    received: int = 0  # reports of the engine
    given: int = 0  # commands for it
    sent: int = 0  # of these, those its pipe has taken

    def has_news_since(self, before: "Traffic") -> bool:
        """Whether the engine said something, and does not leave commands in the pipe."""
        unread = self.given > self.sent == before.sent
        return self.received > before.received and not unread


class Watchdog:
    """Of one spell in which the engine has work."""

    def __init__(self, traffic: Traffic) -> None:
        self._last = traffic
        self._silent = 0

    def look(self, traffic: Traffic) -> bool:
        """Look once more; whether the engine hangs."""
        self._silent = 0 if traffic.has_news_since(self._last) else self._silent + 1
        self._last = traffic
        return self._silent > LOOKS  # the first may have come right after the last news
