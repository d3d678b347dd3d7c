"""The open engine requests of one answer, and the events that arrived for them.

The engine client pushes events, and one task takes all that have arrived. If the task ends early or
the generation fails, the requests that are still open are aborted in the engine.
"""

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType

from mi_runtime.request import TokenEvent
from server.wire.errors import ApiError


class ClientLeft(Exception):
    """The client disconnected, so nobody reads this answer any more."""


class Generation:
    """A context manager: requests that are open at its end are aborted."""

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
        """Whether events may still arrive, or have arrived and were not taken."""
        return bool(self._open or self._events or self._failure)

    async def take(self) -> list[tuple[float, TokenEvent]]:
        """Waits for events, and returns each with the time of its arrival; after a `wake` none.

        Raises the error of a generation that failed.
        """
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
        """Ends one request early, and drops its events that were not taken."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._release(request_id, True)
        self._events = [timed for timed in self._events if timed[1].request_id != request_id]

    def push(self, at: float, event: TokenEvent) -> None:
        """Adds an event. The engine client calls this."""
        self._events.append((at, event))
        if event.finish_reason is not None:
            self._open.discard(event.request_id)
            self._release(event.request_id, False)
        if self._waiter is not None:
            self.wake()

    def fail(self, error: ApiError | ClientLeft) -> None:
        """Ends a generation that is not complete.

        The engine stops at once, even if the reader is slow. `take` raises the error, after it has
        returned the events that arrived before.
        """
        if not self._open:
            return
        self._failure = error
        for request_id in self._open:
            self._release(request_id, True)
        self._open.clear()
        self.wake()

    def fail_after(self, seconds: float, error: ApiError) -> None:
        """Fails with `error` in `seconds` if the generation is not complete by then."""
        self._expiry = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def wake(self) -> None:
        """Lets a waiting `take` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
