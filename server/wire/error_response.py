"""Turns errors into HTTP responses; `errors` itself imports no HTTP library."""

from starlette.responses import JSONResponse

from server.wire.errors import ApiError


def error_response(error: ApiError) -> JSONResponse:
    """Returns the HTTP response for an error."""
    return JSONResponse(error.body, error.status, headers=error.headers)
