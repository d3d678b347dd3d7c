"""The open engine requests of one answer, and the events that came for them.

The engine client pushes; one task takes, as many events at a time as are there. Leaving early and
failing, for whatever reason, abort in the engine what is still open.
"""

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType

from mi_runtime.request import TokenEvent
from server.wire.errors import ApiError


class ClientLeft(Exception):
    """Nobody reads this answer any more."""


class Generation:
    """Use it as a context: what is open at its end is aborted."""

    def __init__(self, request_ids: Iterable[str], release: Callable[[str, bool], None]) -> None:
        self._open = set(request_ids)
        self._release = release  # (request id, whether the engine still works on it)
        self._events: list[tuple[float, TokenEvent]] = []
        self._failure: ApiError | ClientLeft | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None

    def __enter__(self) -> "Generation":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        for request_id in list(self._open):
            self.abort(request_id)

    @property
    def is_open(self) -> bool:
        """Whether events are still to come, or to be taken."""
        return bool(self._open or self._events or self._failure)

    async def take(self) -> list[tuple[float, TokenEvent]]:
        """The events that came, each with the time it did; empty after a `wake`."""
        if not self._events and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._failure is not None and not self._events:
            raise self._failure
        events, self._events = self._events, []
        return events

    def abort(self, request_id: str) -> None:
        """End one request early; no event of it comes any more."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._release(request_id, True)
        self._events = [timed for timed in self._events if timed[1].request_id != request_id]

    def push(self, at: float, event: TokenEvent) -> None:
        """Called by the engine client."""
        self._events.append((at, event))
        if event.finish_reason is not None:
            self._open.discard(event.request_id)
            self._release(event.request_id, False)
        if self._waiter is not None:
            self.wake()

    def fail(self, error: ApiError | ClientLeft) -> None:
        """End an answer that is not complete: the taker gets this error after the events that are
        there. The engine stops at once, also where the taker is held up by a slow reader."""
        if not self._open:
            return
        self._failure = error
        for request_id in self._open:
            self._release(request_id, True)
        self._open.clear()
        self.wake()

    def expire(self, seconds: float, error: ApiError) -> None:
        """Fail with `error` in `seconds`, if the answer is not complete by then."""
        self._expiry = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
