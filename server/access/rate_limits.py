"""Limits how many requests and tokens each caller may use in a minute.

Both are counted in this process, the only one that serves HTTP. The `limits` package counts
requests over a sliding window. What an answer will cost is not known in advance, so tokens are a
leaky bucket that may be overdrawn: a request is accepted while its caller has tokens left, and
after that only once the overdrawn tokens have been refilled at the rate of the limit.
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
MANY: Final = 10_000  # callers; if there are more, those with a full bucket are forgotten


class RateLimits:
    """The quotas of one server; None means no limit."""

    def __init__(self, *, requests: int | None, tokens: int | None) -> None:
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._requests = None if requests is None else RateLimitItemPerMinute(requests)
        self._tokens = tokens
        self._full_at: dict[str, float] = {}  # when a caller's bucket is full again

    def take_request(self, caller: Caller) -> None:
        """Counts one request. Raises `RateLimited` if the caller has no request or token left."""
        self.check_tokens(caller)
        limit = self._requests
        if limit is not None and not self._window.hit(limit, caller.identity):
            until = self._window.get_window_stats(limit, caller.identity).reset_time
            raise _exceeded(limit.amount, "requests", until - time.time())

    def check_tokens(self, caller: Caller) -> None:
        """Raises `RateLimited` if the caller has no token left."""
        if self._tokens is None:
            return
        missing = self._full_at.get(caller.identity, 0.0) - time.monotonic()  # in seconds
        if missing >= MINUTE:
            raise _exceeded(self._tokens, "tokens", missing - MINUTE)

    def charge(self, caller: Caller, tokens: int) -> None:
        """Takes tokens that were used from the caller's quota."""
        if self._tokens is None or not tokens:
            return
        now = time.monotonic()
        if len(self._full_at) >= MANY:
            self._full_at = {who: at for who, at in self._full_at.items() if at > now}
        full_at = max(now, self._full_at.get(caller.identity, now))
        self._full_at[caller.identity] = full_at + tokens * MINUTE / self._tokens


def _exceeded(limit: int, what: str, seconds: float) -> RateLimited:
    message = f"Rate limit reached: {limit} {what} per minute"
    return RateLimited(message, retry_after=math.floor(seconds) + 1)
