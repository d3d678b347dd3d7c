"""The body of a request, within the operator's limit."""

from starlette.requests import Request

from server.errors import BodyTooLarge


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body, which is refused as soon as it is too long."""
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"The body is longer than {limit} bytes")
        parts.append(part)
    return b"".join(parts)
