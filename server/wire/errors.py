"""The errors a client can see, each with its status and code, in one JSON shape.

ApiError
├── InvalidRequest          400 invalid_request_error
│   └── ContextTooLong      400 context_length_exceeded
├── InvalidApiKey           401 invalid_api_key
├── NotFound                404 not_found
│   └── ModelNotFound       404 model_not_found
├── BodyTooLarge            413 request_too_large
├── RateLimited             429 rate_limit_exceeded, with Retry-After
├── RequestFailed           500 internal_error
├── Unavailable             503, with Retry-After
│   ├── Overloaded              overloaded
│   ├── Draining                draining
│   ├── Loading                 loading
│   └── EngineDead              engine_dead
└── DeadlineExceeded        504 deadline_exceeded
"""

from typing import Any, ClassVar, Final

LONGEST_MESSAGE: Final = 500  # characters, so that an error never repeats all of a long input
LONGEST_PARAM: Final = 200
LONGEST_RETRY: Final = 120  # seconds; the OpenAI client ignores longer times


class ApiError(Exception):
    """An error answer: what happened, and the field that it is about, if any."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"
    retry_after: int | None = None  # seconds

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        if retry_after is not None:
            self.retry_after = min(max(retry_after, 1), LONGEST_RETRY)
        self.message = bounded(message, LONGEST_MESSAGE)
        self.param = None if param is None else bounded(param, LONGEST_PARAM)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return error_body(self.message, type=self.type, param=self.param, code=self.code)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code or self.code


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"

    def __init__(self, *, prompt_tokens: int, max_model_len: int, param: str = "messages") -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens, and the answer needs at least 1; "
            f"this model's context holds {max_model_len} tokens",
            param=param,
        )


class InvalidApiKey(ApiError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"

    def __init__(self, name: str, served: str) -> None:
        super().__init__(
            f"The model {bounded(name, 80)!r} does not exist; this server serves {served!r} "
            f"and its aliases, such as {served + '@0.6'!r}",
            param="model",
        )


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class RequestFailed(ApiError):
    """This request failed in the engine; the others continue."""


class Unavailable(ApiError):
    status = 503
    retry_after = 1


class Overloaded(Unavailable):
    code = "overloaded"


class Draining(Unavailable):
    code = "draining"
    retry_after = 5


class Loading(Unavailable):
    code = "loading"
    retry_after = 2


class EngineDead(Unavailable):
    code = "engine_dead"
    retry_after = 10


class DeadlineExceeded(ApiError):
    status = 504
    code = "deadline_exceeded"


def error_body(message: str, *, type: str, param: str | None, code: str) -> dict[str, Any]:
    """Returns the JSON object of an error."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def bounded(text: str, limit: int) -> str:
    """Returns `text`, cut to at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
