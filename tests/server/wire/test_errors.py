"""Every error has one status, code and shape, and says when to try again if that may help."""

import pytest

from server.wire.errors import (
    ApiError,
    BodyTooLarge,
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    EngineDead,
    InvalidApiKey,
    InvalidRequest,
    Loading,
    ModelNotFound,
    Overloaded,
    RateLimited,
    RequestFailed,
    Unavailable,
)

ERRORS = [
    (InvalidRequest("m"), 400, "invalid_request_error"),
    (ContextTooLong(prompt_tokens=9, max_model_len=8), 400, "context_length_exceeded"),
    (ModelNotFound("x", "pair"), 404, "model_not_found"),
    (InvalidApiKey("m"), 401, "invalid_api_key"),
    (BodyTooLarge("m"), 413, "request_too_large"),
    (RateLimited("m", retry_after=3), 429, "rate_limit_exceeded"),
    (RequestFailed("m"), 500, "internal_error"),
    (Overloaded("m"), 503, "overloaded"),
    (Draining("m"), 503, "draining"),
    (Loading("m"), 503, "loading"),
    (EngineDead("m"), 503, "engine_dead"),
    (DeadlineExceeded("m"), 504, "deadline_exceeded"),
]


@pytest.mark.parametrize(("error", "status", "code"), ERRORS)
def test_every_error_has_one_shape(error: ApiError, status: int, code: str) -> None:
    assert error.status == status
    assert set(error.body) == {"error"}
    assert set(error.body["error"]) == {"message", "type", "param", "code"}
    assert error.body["error"]["code"] == code


@pytest.mark.parametrize("error", [error for error, _, _ in ERRORS])
def test_only_a_temporary_error_says_when_to_try_again(error: ApiError) -> None:
    if isinstance(error, Unavailable | RateLimited):
        assert 1 <= int(error.headers["Retry-After"]) <= 120
    else:
        assert "Retry-After" not in error.headers


def test_messages_and_params_are_bounded() -> None:
    error = InvalidRequest("x" * 10_000, param="y" * 10_000)
    assert len(error.message) == 500
    assert len(error.param or "") == 200


@pytest.mark.parametrize(("seconds", "header"), [(-3, "1"), (0, "1"), (7, "7"), (900, "120")])
def test_retry_after_lies_between_one_second_and_two_minutes(seconds: int, header: str) -> None:
    assert Overloaded("m", retry_after=seconds).headers["Retry-After"] == header
