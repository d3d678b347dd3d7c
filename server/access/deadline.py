"""The time by which a request must be answered: the server's limit, or the caller's if earlier.

Time counts from the request's arrival, so it includes reading, encoding and waiting for the engine.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from server.engine.generation import Generation
from server.wire.errors import DeadlineExceeded, InvalidRequest

TIMEOUT_HEADER: Final = "X-Request-Timeout"


@dataclass(frozen=True, slots=True)
class Deadline:
    """A deadline `seconds` after `arrived` (`time.perf_counter`), or none if `seconds` is None."""

    seconds: float | None
    arrived: float

    @classmethod
    def of(cls, headers: Mapping[bytes, bytes], limit: float | None, arrived: float) -> "Deadline":
        """Reads the raw headers of a request; `limit` is the server's. Raises `InvalidRequest`."""
        given = headers.get(TIMEOUT_HEADER.lower().encode())
        if given is None:
            return cls(limit, arrived)
        seconds = _seconds(given.decode("latin-1"))
        return cls(seconds if limit is None else min(seconds, limit), arrived)

    @property
    def error(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"The answer was not complete within {self.seconds:g} s")

    @asynccontextmanager
    async def enforced(self) -> AsyncIterator[None]:
        """Raises `DeadlineExceeded` if the block does not end in time."""
        try:
            async with asyncio.timeout(self._left()):
                yield
        except TimeoutError:
            raise self.error from None

    def apply_to(self, generation: Generation) -> None:
        """Makes the generation fail with `DeadlineExceeded` if it is open at the deadline."""
        left = self._left()
        if left is not None:
            generation.fail_after(left, self.error)

    def _left(self) -> float | None:
        if self.seconds is None:
            return None
        return self.arrived + self.seconds - time.perf_counter()


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidRequest(
            f"`{TIMEOUT_HEADER}` must be a number of seconds above 0", param=TIMEOUT_HEADER
        )
    return seconds
