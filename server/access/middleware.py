"""Checks API key, quota and timeout by the headers alone.

A request that is refused here costs no body, no JSON and no tokenizer. One that is let through has
its `Caller` and its `Deadline` in the state of its scope. Only POST requests count against a quota,
and the paths in `OPEN_PATHS` are not checked at all. `server.api.submission` charges for tokens.
"""

from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.callers import Caller, KeyRing
from server.access.deadline import Deadline
from server.access.rate_limits import RateLimits
from server.ops.request_log import QUIET_PATHS, RequestNotes, path_of
from server.wire.error_response import error_response
from server.wire.errors import ApiError

OPEN_PATHS: Final = QUIET_PATHS | {"/version", "/"}


class AccessMiddleware:
    """ASGI middleware. The request log is outside of it, and logs its refusals too."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        limits: RateLimits,
        request_timeout: float | None,
        count_refusal: Callable[[str], None],
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._request_timeout = request_timeout
        self._count_refusal = count_refusal  # receives the code of the error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        notes: RequestNotes = scope["state"]["notes"]
        try:
            self._check(scope, notes)
        except ApiError as error:
            self._count_refusal(error.code)
            notes.fields["error"] = error.code
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, notes: RequestNotes) -> None:
        """Puts the caller and the deadline into the state of the scope.

        Raises `InvalidApiKey`, `RateLimited`, or `InvalidRequest` for a bad timeout.
        """
        headers = dict(scope["headers"])
        caller = self._caller(scope, headers.get(b"authorization", b""))
        if caller.name is not None:
            notes.fields["key"] = caller.name
        scope["state"]["deadline"] = Deadline.of(headers, self._request_timeout, notes.arrived)
        if scope["method"] == "POST":
            self._limits.take_request(caller)
        scope["state"]["caller"] = caller

    def _caller(self, scope: Scope, authorization: bytes) -> Caller:
        if self._keys:
            return self._keys.caller(authorization)
        client = scope.get("client")
        return Caller(identity=client[0] if client else "")
