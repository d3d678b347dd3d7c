"""A request goes from the ASGI entry to the pipe through the functions of docs/architecture.md."""

import importlib
import re
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import pytest
from starlette.testclient import TestClient

from mi_runtime.request import Submit
from server.api import chat
from tests.server.chat_requests import answer_to

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LISTED = [
    (function, file)
    for function, file in re.findall(r"^\d\. `(\S+)` \(`(server/\S+)`\)", PAGE, re.MULTILINE)
]


def test_the_path_has_at_most_eight_functions_in_six_files() -> None:
    assert 2 < len(LISTED) <= 8
    assert len({file for _, file in LISTED}) <= 6
    assert (LISTED[0][0], LISTED[-1][0]) == ("RequestLog.__call__", "EngineClient._write")


@pytest.mark.parametrize(("function", "file"), LISTED)
def test_every_function_of_the_path_is_where_the_page_says(function: str, file: str) -> None:
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    assert callable(reduce(getattr, function.split("."), module))


def server_functions(frame: FrameType | None) -> list[tuple[str, str]]:
    """Returns the functions of the server on the stack, outermost first, with their files."""
    found: list[tuple[str, str]] = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(str(ROOT / "server")):
            found.insert(0, (code.co_qualname, str(Path(code.co_filename).relative_to(ROOT))))
        frame = frame.f_back
    return found


def test_only_the_functions_that_the_page_lists_call_each_other(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, stack = client.app_state["service"].engine, list[tuple[str, str]]()
    commands: SimpleQueue[object] = engine._commands

    class Commands:
        get = commands.get

        def put(self, command: object) -> None:
            if isinstance(command, Submit):
                stack.extend(server_functions(sys._getframe(1)))
            commands.put(command)

    monkeypatch.setattr(engine, "_commands", Commands())
    answer_to(client, "say hi")
    steps = ("admission", "prepare_chat", "EngineClient._write")  # done before, or in a thread
    assert stack == [entry for entry in LISTED if entry[0] not in steps]


def test_admission_is_checked_before_the_body_and_before_the_engine(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, steps = client.app_state["service"], list[str]()
    admit, read, submit = service.admit, chat.read_body, service.engine.submit

    def recording(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            steps.append(step)
            return function(*arguments)

        return call

    monkeypatch.setattr(service, "admit", recording("admit", admit))
    monkeypatch.setattr(chat, "read_body", recording("read", read))
    monkeypatch.setattr(service.engine, "submit", recording("submit", submit))
    answer_to(client, "say hi")
    assert steps == ["admit", "read", "admit", "submit"]
