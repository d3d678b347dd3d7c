"""Formats every log line of this process, uvicorn's included, as readable text or as JSON.

A record may have fields: `logger.info("…", extra={"fields": {...}})`. Records of libraries have
none. The engine process writes to the same stream by itself.
"""

import logging
from typing import Any, Final, Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

SHOWN_FIRST: Final = ("timestamp", "level", "logger", "event")
IN_EVENT: Final = frozenset({"method", "path", "status"})
"""Fields that the text of a request's line contains already."""


def configure(level: str, log_format: Literal["text", "json"]) -> None:
    """Sets up the root logger; called once, before anything is logged."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(log_format))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def formatter(log_format: Literal["text", "json"]) -> logging.Formatter:
    """Returns the formatter of readable lines, or of JSON lines."""
    as_text = log_format == "text"
    renderer: Processor = _text if as_text else structlog.processors.JSONRenderer(default=str)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.processors.TimeStamper(
                fmt="%Y-%m-%d %H:%M:%S" if as_text else "iso", utc=not as_text
            ),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(allow=["fields"]),
            _with_fields,
            structlog.processors.format_exc_info,
        ],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )


def loggable(value: Any) -> str:
    """Returns `value` as one printable word, escaped if it is not one."""
    text = str(value)
    return text if text.isprintable() and " " not in text else ascii(text)


def _with_fields(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {**event.pop("fields", {}), **event}


def _text(_: WrappedLogger, __: str, event: EventDict) -> str:
    traceback = event.pop("exception", None)
    fields = [
        f"{name}={loggable(value)}"
        for name, value in event.items()
        if name not in SHOWN_FIRST and name not in IN_EVENT
    ]
    start = f"{event['timestamp']} {event['level'].upper()} {event['logger']}: {event['event']}"
    line = " ".join([start, *fields])
    return line if traceback is None else f"{line}\n{traceback}"
