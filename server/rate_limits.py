"""What each caller may have a minute: requests, and tokens.

Counted in this process, which is the only one that serves HTTP, over a sliding window of `limits`.
What an answer will cost is not known before: a request is let in while its caller has tokens left,
and what it takes beyond them is owed, to be paid from the minutes that follow.
"""

import math
import time
from typing import Final

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from server.callers import Caller
from server.errors import RateLimited

REQUESTS: Final = "requests"
TOKENS: Final = "tokens"


class RateLimits:
    """The quotas of one server; None: no limit."""

    def __init__(self, *, requests: int | None, tokens: int | None) -> None:
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._requests = None if requests is None else RateLimitItemPerMinute(requests)
        self._tokens = None if tokens is None else RateLimitItemPerMinute(tokens)
        self._owed: dict[str, int] = {}  # tokens, by the callers that took more than they had

    def take_request(self, caller: Caller) -> None:
        """Count one request. Raises `RateLimited` where none is left, or no tokens are."""
        self.check_tokens(caller)
        if self._requests and not self._window.hit(self._requests, REQUESTS, caller.identity):
            raise self._exceeded(self._requests, REQUESTS, caller)

    def check_tokens(self, caller: Caller) -> None:
        """Raises `RateLimited` where the caller's tokens of this minute are spent."""
        if self._tokens is None:
            return
        self.spend(caller, 0)
        if caller.identity in self._owed or not self._left(self._tokens, caller):
            raise self._exceeded(self._tokens, TOKENS, caller)

    def spend(self, caller: Caller, tokens: int) -> None:
        """Count tokens that were used; those beyond the quota are owed."""
        if self._tokens is None:
            return
        owed = self._owed.pop(caller.identity, 0) + tokens
        paid = min(owed, self._left(self._tokens, caller))
        if paid and self._window.hit(self._tokens, TOKENS, caller.identity, cost=paid):
            owed -= paid
        if owed:
            self._owed[caller.identity] = owed

    def _left(self, limit: RateLimitItem, caller: Caller) -> int:
        return self._window.get_window_stats(limit, TOKENS, caller.identity).remaining

    def _exceeded(self, limit: RateLimitItem, what: str, caller: Caller) -> RateLimited:
        until = self._window.get_window_stats(limit, what, caller.identity).reset_time
        return RateLimited(
            f"The limit of {limit.amount} {what} a minute is reached",
            retry_after=math.ceil(until - time.time()),
        )
