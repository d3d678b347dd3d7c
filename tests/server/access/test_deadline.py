"""A request past its deadline gets a 504, or an error in its stream, and the engine stops."""

import asyncio
import json
import time
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from server.access.deadline import Deadline
from server.service import Service
from server.wire.errors import DeadlineExceeded, InvalidRequest
from tests.server.chat_requests import MakeClient, WaitUntil, chat, check_error, metric


@pytest.fixture
def wait_until_idle(wait_until: WaitUntil) -> Callable[[TestClient], None]:
    """Returns a function that waits until the engine works on no request."""

    def wait(client: TestClient) -> None:
        service: Service = client.app_state["service"]
        stats = lambda: service.engine.stats.running + service.engine.stats.waiting  # noqa: E731
        wait_until(lambda: service.engine.open_requests == 0 and stats() == 0)

    return wait


@pytest.mark.parametrize("content", ["forever", "wait"])
def test_an_answer_that_takes_too_long_is_a_504_and_the_engine_stops(
    content: str, make_client: MakeClient, wait_until_idle: Callable[[TestClient], None]
) -> None:
    client = make_client(request_timeout=0.5)
    check_error(chat(client, content), 504, "deadline_exceeded")
    wait_until_idle(client)
    assert metric(client, "mi_request_success_total", finished_reason="deadline") == 1


def test_a_stream_that_takes_too_long_ends_with_an_error(
    make_client: MakeClient, wait_until_idle: Callable[[TestClient], None]
) -> None:
    client = make_client()
    response = chat(client, "forever", {"X-Request-Timeout": "0.5"}, stream=True)
    *events, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert len(events) > 2
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    wait_until_idle(client)


def test_a_deadline_that_passes_before_the_200_is_a_504(make_client: MakeClient) -> None:
    client = make_client(request_timeout=1e-9)
    check_error(chat(client, "say x", stream=True), 504, "deadline_exceeded")
    assert metric(client, "mi_admission_rejections_total", reason="deadline_exceeded") == 1


def test_an_answer_within_its_deadline_is_unchanged(make_client: MakeClient) -> None:
    client = make_client(request_timeout=100)
    assert chat(client, "say x").json()["choices"][0]["message"]["content"] == "x"
    assert metric(client, "mi_request_success_total", finished_reason="stop") == 1


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", "", "1e400"])
def test_a_timeout_that_is_no_positive_number_is_refused(
    given: str, make_client: MakeClient
) -> None:
    check_error(
        chat(make_client(), "say x", {"X-Request-Timeout": given}),
        400,
        "invalid_request_error",
        "X-Request-Timeout",
    )


@pytest.mark.parametrize(
    ("given", "limit", "seconds"),
    [(None, None, None), (None, 9.0, 9.0), (b"3", None, 3.0), (b"3", 9.0, 3.0), (b"30", 9.0, 9.0)],
)
def test_the_earlier_of_the_requests_and_the_operators_deadline_counts(
    given: bytes | None, limit: float | None, seconds: float | None
) -> None:
    headers = {} if given is None else {b"x-request-timeout": given}
    assert Deadline.of(headers, limit, arrived=0.0).seconds == seconds


def test_waiting_for_a_slow_body_ends_at_the_deadline() -> None:
    async def scenario() -> None:
        async with Deadline(0.05, time.perf_counter()).enforced():
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
        asyncio.run(scenario())


def test_an_error_before_the_deadline_is_raised_unchanged() -> None:
    async def scenario() -> None:
        async with Deadline(60, time.perf_counter()).enforced():
            raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        asyncio.run(scenario())
