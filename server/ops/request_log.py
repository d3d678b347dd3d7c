"""Gives every request an id, which `X-Request-Id` returns, and logs one line when it ends.

If tracing is configured, it records a span with the same facts as well.
"""

import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.ops.logs import loggable

if TYPE_CHECKING:  # OpenTelemetry is imported only if tracing is configured
    from server.ops.tracing import Tracing

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER: Final = "X-Request-Id"
QUIET_PATHS: Final = frozenset({"/health", "/ready", "/metrics"})
_ACCEPTABLE_ID: Final = re.compile(r"[\w.:/@+=-]{1,128}", re.ASCII)


@dataclass(slots=True)
class RequestNotes:
    """The id of one request, and what its handlers note for its log line and its span."""

    request_id: str
    given: bool  # the client gave the id
    arrived: float  # time.perf_counter
    fields: dict[str, Any] = field(default_factory=dict)  # of the log line


class RequestLog:
    """The outermost ASGI middleware, so that errors have an id as well."""

    def __init__(self, app: ASGIApp, tracing: "Tracing | None" = None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = _new_notes(Headers(scope=scope).get(REQUEST_ID_HEADER))
        scope.setdefault("state", {})["notes"] = notes
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = notes.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._record(scope, status, notes)

    def _record(self, scope: Scope, status: int, notes: RequestNotes) -> None:
        quiet = path_of(scope) in QUIET_PATHS
        seconds = time.perf_counter() - notes.arrived
        notes.fields = {"id": notes.request_id, **notes.fields}
        if self._tracing is not None and not quiet:
            notes.fields["trace_id"] = self._tracing.record(
                method=scope["method"],
                path=path_of(scope),
                status=status,
                headers=Headers(scope=scope),
                notes=notes.fields,
                seconds=seconds,
            )
        notes.fields["total_s"] = round(seconds, 4)
        _log(logging.DEBUG if quiet else logging.INFO, scope, status, notes.fields)


def path_of(scope: Scope) -> str:
    """Returns the path as routes are written, without the prefix of a gateway."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _new_notes(given: str | None) -> RequestNotes:
    """Returns the notes of a new request, with a new id if `given` is not acceptable."""
    if given is not None and _ACCEPTABLE_ID.fullmatch(given):
        return RequestNotes(given, True, time.perf_counter())
    return RequestNotes(uuid.uuid4().hex, False, time.perf_counter())


def _log(level: int, scope: Scope, status: int, notes: dict[str, Any]) -> None:
    method, path = scope["method"], scope["path"]
    fields = {"method": method, "path": path, "status": status, **notes}
    # Escaped, because a path is the client's text and may hold line breaks.
    logger.log(level, "%s %s %d", method, loggable(path), status, extra={"fields": fields})
