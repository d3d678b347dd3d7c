"""How fast requests end, and so when one that finds the queue full may come back."""

import math
from collections import deque
from typing import Final

REMEMBERED: Final = 64  # ends
RECENT: Final = 60.0  # seconds


class Pace:
    """The ends of the last requests, on any clock that the caller keeps to."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=REMEMBERED)

    def ended(self, at: float) -> None:
        self._ends.append(at)

    def seconds_for(self, requests: int, now: float) -> int:
        """In how many seconds that many have ended, at the recent pace; 1 where none is known."""
        while self._ends and self._ends[0] < now - RECENT:
            self._ends.popleft()
        if not self._ends:
            return 1
        return math.ceil(requests * (now - self._ends[0]) / len(self._ends))
