"""Errors as answers. What they say is `errors`' business; this module alone ties them to HTTP."""

from starlette.responses import JSONResponse

from server.wire.errors import ApiError


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)
