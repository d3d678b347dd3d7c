"""Ends a generation when its client disconnects."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from server.engine.generation import ClientLeft, Generation


@asynccontextmanager
async def ended_on_disconnect(generation: Generation, receive: Receive) -> AsyncIterator[None]:
    """Ends the generation at the end of the block, or before if its client disconnects."""
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
