"""What each caller may have a minute: requests, and tokens.

Counted in this process, which is the only one that serves HTTP. Requests are counted over a sliding
window by `limits`. What an answer will cost is not known before, so tokens are a leaky bucket that
may be overdrawn: a request is let in while its caller has tokens left, and the next one once what
was taken beyond them has come back at the rate of the limit.
"""

import math
import time
from typing import Final

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from server.access.callers import Caller
from server.wire.errors import RateLimited

MINUTE: Final = 60.0  # seconds
MANY: Final = 10_000  # callers, at which those that owe nothing are forgotten


class RateLimits:
    """The quotas of one server; None: no limit."""

    def __init__(self, *, requests: int | None, tokens: int | None) -> None:
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._requests = None if requests is None else RateLimitItemPerMinute(requests)
        self._tokens = tokens
        self._whole_at: dict[str, float] = {}  # when a caller has all tokens of a minute again

    def take_request(self, caller: Caller) -> None:
        """Count one request. Raises `RateLimited` where none is left, or no tokens are."""
        self.check_tokens(caller)
        limit = self._requests
        if limit is not None and not self._window.hit(limit, caller.identity):
            until = self._window.get_window_stats(limit, caller.identity).reset_time
            raise _exceeded(limit.amount, "requests", until - time.time())

    def check_tokens(self, caller: Caller) -> None:
        """Raises `RateLimited` where the caller has no token left."""
        if self._tokens is None:
            return
        missing = self._whole_at.get(caller.identity, 0.0) - time.monotonic()  # seconds' worth
        if missing >= MINUTE:
            raise _exceeded(self._tokens, "tokens", missing - MINUTE)

    def spend(self, caller: Caller, tokens: int) -> None:
        """Count tokens that were used."""
        if self._tokens is None or not tokens:
            return
        now = time.monotonic()
        if len(self._whole_at) >= MANY:
            self._whole_at = {who: at for who, at in self._whole_at.items() if at > now}
        whole_at = max(now, self._whole_at.get(caller.identity, now))
        self._whole_at[caller.identity] = whole_at + tokens * MINUTE / self._tokens


def _exceeded(limit: int, what: str, seconds: float) -> RateLimited:
    message = f"The limit of {limit} {what} a minute is reached"
    return RateLimited(message, retry_after=math.floor(seconds) + 1)
