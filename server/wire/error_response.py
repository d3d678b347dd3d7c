"""Turns errors into HTTP answers; `errors` itself knows no HTTP library."""

from starlette.responses import JSONResponse

from server.wire.errors import ApiError


def error_response(error: ApiError) -> JSONResponse:
    """Returns the HTTP answer of an error."""
    return JSONResponse(error.body, error.status, headers=error.headers)
