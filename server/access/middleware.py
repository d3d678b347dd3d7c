"""The gate before every route: who is it, and is the quota left? Answered from the headers alone.

A request that is refused here costs no body, no JSON and no tokenizer. What gets through carries
its `Caller` and its `Deadline` in the state of its scope.
"""

from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.callers import Caller, KeyRing
from server.access.deadline import Deadline
from server.access.rate_limits import RateLimits
from server.ops.request_log import QUIET_PATHS, Trace, path_of
from server.wire.error_response import error_response
from server.wire.errors import ApiError

OPEN_PATHS: Final = QUIET_PATHS | {"/version", "/"}


class Gate:
    """ASGI middleware inside the request log, which tells the refusals."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        limits: RateLimits,
        request_timeout: float | None,
        rejected: Callable[[str], None],
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._request_timeout = request_timeout
        self._rejected = rejected  # is told the code of every refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            caller = self._admit(scope)
        except ApiError as error:
            self._rejected(error.code)
            scope["state"]["trace"].notes["error"] = error.code
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            trace: Trace = scope["state"]["trace"]
            self._limits.spend(caller, trace.notes.get("completion", 0))

    def _admit(self, scope: Scope) -> Caller:
        """Raises `InvalidApiKey`, `RateLimited`, and `InvalidRequest` for a bad time-out."""
        headers = dict(scope["headers"])
        trace: Trace = scope["state"]["trace"]
        caller = self._caller(scope, headers.get(b"authorization", b""))
        if caller.name is not None:
            trace.notes["key"] = caller.name
        scope["state"]["deadline"] = Deadline.asked(headers, self._request_timeout, trace.arrived)
        if scope["method"] == "POST":
            self._limits.take_request(caller)
        scope["state"]["caller"] = caller
        return caller

    def _caller(self, scope: Scope, authorization: bytes) -> Caller:
        if self._keys:
            return self._keys.caller(authorization)
        client = scope.get("client")
        return Caller(identity=client[0] if client else "")
