"""Estimates when a request that finds the queue full should be sent again."""

import math
from collections import deque
from typing import Final

REMEMBERED: Final = 64  # ends
RECENT: Final = 60.0  # seconds


class RetryAfter:
    """Remembers when the last requests ended. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=REMEMBERED)

    def note_end(self, at: float) -> None:
        self._ends.append(at)

    def estimate(self, requests: int, now: float) -> int:
        """Returns the seconds until that many requests end at the recent rate; 1 if unknown."""
        while self._ends and self._ends[0] < now - RECENT:
            self._ends.popleft()
        if not self._ends:
            return 1
        return math.ceil(requests * (now - self._ends[0]) / len(self._ends))
