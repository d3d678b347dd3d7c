"""The HTTP response of a streamed answer."""

from collections.abc import AsyncGenerator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.disconnect import ended_on_disconnect
from server.engine.generation import Generation


class EventStream(Response):
    """Sends the server-sent events of one generation.

    Starlette's StreamingResponse cancels the generator when the client disconnects. Here the
    generator ends by itself, so that its `finally` runs while its data is consistent.
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
        async with ended_on_disconnect(self._generation, receive):
            try:
                await send(start)
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await self._events.aclose()
