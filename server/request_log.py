"""Every request has an id that comes back in `X-Request-Id`, and leaves one line in the log."""

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

HEADER: Final = "X-Request-Id"
QUIET_PATHS: Final = frozenset({"/health", "/ready", "/metrics"})
_ACCEPTABLE_ID: Final = re.compile(r"[\w.:/@+=-]{1,128}", re.ASCII)


@dataclass(slots=True)
class Trace:
    """What is noted about one request on its way."""

    request_id: str
    given: bool  # by the client
    arrived: float  # time.perf_counter
    notes: dict[str, Any] = field(default_factory=dict)


class RequestLog:
    """ASGI middleware, the outermost: errors have an id as well."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace = _trace(Headers(scope=scope).get(HEADER))
        scope.setdefault("state", {})["trace"] = trace
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = trace.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            _log(scope, status, trace)


def path_of(scope: Scope) -> str:
    """The path as the routes know it, without the prefix of a gateway."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _trace(given: str | None) -> Trace:
    """An id that could not stand in a log line is replaced."""
    if given is not None and _ACCEPTABLE_ID.fullmatch(given):
        return Trace(given, True, time.perf_counter())
    return Trace(uuid.uuid4().hex, False, time.perf_counter())


def _log(scope: Scope, status: int, trace: Trace) -> None:
    level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
    if not logger.isEnabledFor(level):
        return
    seconds = time.perf_counter() - trace.arrived
    notes = {"id": trace.request_id, **trace.notes, "total_s": round(seconds, 4)}
    said = " ".join(f"{name}={_loggable(value)}" for name, value in notes.items())
    # Quoted as JSON would: a path is the client's text, and may hold line breaks.
    logger.log(level, "%s %s %d %s", scope["method"], _loggable(scope["path"]), status, said)


def _loggable(value: Any) -> str:
    """One word on one line, whatever a client sent."""
    text = str(value)
    return text if text.isprintable() and " " not in text else ascii(text)
