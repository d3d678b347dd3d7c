"""Noticing that the client left, while its answer is still being made."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.engine.generation import ClientLeft, Generation


@asynccontextmanager
async def watched(generation: Generation, receive: Receive) -> AsyncIterator[None]:
    """Inside the block, a client that disconnects ends the generation; so does the block's end."""
    watcher = asyncio.create_task(_watch(generation, receive))
    try:
        with generation:
            yield
    finally:
        watcher.cancel()


async def _watch(generation: Generation, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.fail(ClientLeft())


class EventStream(Response):
    """Server-sent events of one generation.

    Starlette's own StreamingResponse cancels the generator when the client leaves; here it ends by
    itself, and its `finally` runs where its data is consistent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        generation: Generation,
        headers: Mapping[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._generation = generation
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with watched(self._generation, receive):
            try:
                await send(start)
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await self._events.aclose()
