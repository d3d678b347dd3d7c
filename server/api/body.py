"""Reads the body of a request within the operator's limit, and parses it."""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from starlette.requests import Request

from server.wire.errors import BodyTooLarge

LONG: Final = 2**16  # bytes; parsing more would block the event loop for milliseconds

_T = TypeVar("_T")


async def read_body(request: Request, limit: int) -> bytes:
    """Returns the request's body. Raises `BodyTooLarge` as soon as it is longer than `limit`."""
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"The body is longer than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


async def parse_without_blocking(body: bytes, parse: Callable[[bytes], _T]) -> _T:
    """Parses the body, in a thread if it is long. Raises what `parse` raises."""
    return parse(body) if len(body) < LONG else await asyncio.to_thread(parse, body)
