"""Admits requests for answers, and counts those that are refused.

Admission is checked twice: here, before the body is read, so that a refusal costs nothing, and in
`submission`, since reading and encoding take time in which the server may begin to drain, the queue
may fill up, and the caller's other requests may use up its tokens. The access middleware checked
the key and the quota before.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from mi_runtime.request import EngineInfo
from server.access.deadline import Deadline
from server.service import Service
from server.wire.errors import DeadlineExceeded, RateLimited, Unavailable


@asynccontextmanager
async def admission(request: Request, service: Service) -> AsyncIterator[EngineInfo]:
    """Yields what the engine reported about itself. Prepare and submit the request in the block.

    Raises `Unavailable`, `RateLimited` or `DeadlineExceeded`; the work in the block may raise them,
    too.
    """
    deadline: Deadline = request.state.deadline
    try:
        info = service.admit()
        service.engine.check_room()
        async with deadline.enforced():
            yield info
    except (Unavailable, RateLimited, DeadlineExceeded) as error:
        service.metrics.rejected(error.code)
        raise
