"""Every request gets an id, and one log line when it ends."""

import asyncio
import logging
from typing import Any

import pytest

from server.ops.request_log import RequestLog, RequestNotes


def run(path: str, headers: dict[str, str], app: Any) -> list[Any]:
    """Returns the messages that the app sends through the request log."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": raw}
    asyncio.run(RequestLog(app)(scope, receive, send))
    return sent


async def answer(scope: Any, receive: Any, send: Any) -> None:
    notes: RequestNotes = scope["state"]["notes"]
    notes.fields["lambda"] = 0.6
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Captures what the request log writes, at any level."""
    caplog.set_level(logging.DEBUG, "server.ops.request_log")
    return caplog


@pytest.mark.parametrize(
    ("given", "kept"),
    [("mine-1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False)],
)
def test_a_readable_id_of_the_client_is_kept_and_any_other_replaced(given: str, kept: bool) -> None:
    (start,) = run("/x", {"X-Request-Id": given}, answer)
    (value,) = [value.decode() for name, value in start["headers"] if name == b"x-request-id"]
    assert (value == given) is kept
    assert value


def test_the_line_has_the_status_the_id_and_what_the_handler_noted(
    log: pytest.LogCaptureFixture,
) -> None:
    run("/x", {"X-Request-Id": "mine"}, answer)
    record: Any
    (record,) = log.records
    assert record.getMessage() == "GET /x 200"
    assert {"id": "mine", "status": 200, "lambda": 0.6}.items() <= record.fields.items()
    assert record.fields["total_s"] >= 0


def test_a_path_cannot_forge_a_line(log: pytest.LogCaptureFixture) -> None:
    run("/x\nINFO forged", {}, answer)
    assert log.records[0].getMessage() == r"GET '/x\nINFO forged' 200"


@pytest.mark.parametrize(("path", "level"), [("/health", logging.DEBUG), ("/v1", logging.INFO)])
def test_probes_are_logged_for_debugging_only(
    path: str, level: int, log: pytest.LogCaptureFixture
) -> None:
    run(path, {}, answer)
    assert [record.levelno for record in log.records] == [level]


def test_a_request_whose_handler_fails_is_logged_too(log: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run("/x", {}, fail)
    assert [record.getMessage() for record in log.records] == ["GET /x 0"]
