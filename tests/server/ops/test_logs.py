"""Every log line is one line of text or one JSON object, with its fields and its exception."""

import io
import json
import logging
from collections.abc import Callable
from typing import Any, Literal

from server.ops import logs


def written(log: Callable[[logging.Logger], None], format: Literal["text", "json"]) -> str:
    """Returns what the records that `log` makes are written as."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter(format))
    logger = logging.Logger("some.library")
    logger.addHandler(handler)
    log(logger)
    return stream.getvalue()


def log_exception(logger: logging.Logger) -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        logger.exception("It %s", "broke")


FIELDS = {"method": "GET", "path": "/x", "status": 200, "lambda": 0.6, "user": "a\nb", "name": "n"}


def log_with_fields(logger: logging.Logger) -> None:
    logger.info("GET /x 200", extra={"fields": FIELDS})


def test_a_readable_line_ends_with_its_fields() -> None:
    line = written(log_with_fields, "text")
    assert line.count("\n") == 1
    assert line.endswith(r"INFO some.library: GET /x 200 lambda=0.6 user='a\nb' name=n" + "\n")


def test_a_json_line_is_one_object_with_every_field() -> None:
    got: dict[str, Any] = json.loads(written(log_with_fields, "json"))
    assert FIELDS.items() <= got.items()
    assert (got["event"], got["level"], got["logger"]) == ("GET /x 200", "info", "some.library")
    assert got["timestamp"].endswith("Z")


def test_fields_cannot_replace_the_level_or_the_event() -> None:
    def forge(logger: logging.Logger) -> None:
        logger.info("true", extra={"fields": {"level": "critical", "event": "false"}})

    got = json.loads(written(forge, "json"))
    assert (got["event"], got["level"]) == ("true", "info")


def test_a_traceback_follows_its_line_of_text_or_is_a_field_of_its_object() -> None:
    first, *trace = written(log_exception, "text").splitlines()
    assert first.endswith("ERROR some.library: It broke")
    assert trace[-1] == "ValueError: inside"
    lines = written(log_exception, "json").splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["exception"].endswith("ValueError: inside")
