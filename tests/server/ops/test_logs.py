import io
import json
import logging
from collections.abc import Callable
from typing import Any, Literal

import pytest

from server.ops import logs

Say = Callable[[Callable[[logging.Logger], None], Literal["text", "json"]], str]


@pytest.fixture
def say() -> Say:
    """What a logger's records are written as."""

    def run(speak: Callable[[logging.Logger], None], format: Literal["text", "json"]) -> str:
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logs.formatter(format))
        logger = logging.Logger("some.library")
        logger.addHandler(handler)
        speak(logger)
        return stream.getvalue()

    return run


def fail(logger: logging.Logger) -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        logger.exception("It %s", "broke")


FIELDS = {"method": "GET", "path": "/x", "status": 200, "lambda": 0.6, "user": "a\nb", "name": "n"}


def log_with_fields(logger: logging.Logger) -> None:
    logger.info("GET /x 200", extra={"fields": FIELDS})


def test_a_readable_line_ends_with_its_fields(say: Say) -> None:
    line = say(log_with_fields, "text")
    assert line.count("\n") == 1
    assert line.endswith(r"INFO some.library: GET /x 200 lambda=0.6 user='a\nb' name=n" + "\n")


def test_a_json_line_is_one_object_with_every_field(say: Say) -> None:
    got: dict[str, Any] = json.loads(say(log_with_fields, "json"))
    assert FIELDS.items() <= got.items()
    assert (got["event"], got["level"], got["logger"]) == ("GET /x 200", "info", "some.library")
    assert got["timestamp"].endswith("Z")


def test_fields_cannot_replace_those_of_the_pipeline(say: Say) -> None:
    def forge(logger: logging.Logger) -> None:
        logger.info("true", extra={"fields": {"level": "critical", "event": "false"}})

    got = json.loads(say(forge, "json"))
    assert (got["event"], got["level"]) == ("true", "info")


def test_an_exception_is_below_its_line_or_in_its_object(say: Say) -> None:
    first, *trace = say(fail, "text").splitlines()
    assert first.endswith("ERROR some.library: It broke")
    assert trace[-1] == "ValueError: inside"
    lines = say(fail, "json").splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["exception"].endswith("ValueError: inside")
