"""The path of a request from the ASGI entry to the pipe, as docs/architecture.md lists it."""

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

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LISTED = [
    (function, file)
    for function, file in re.findall(r"^\d\. `(\S+)` \(`(server/\S+)`\)", PAGE, re.MULTILINE)
]


def test_the_way_has_at_most_eight_functions_and_six_files() -> None:
    assert 2 < len(LISTED) <= 8
    assert len({file for _, file in LISTED}) <= 6


@pytest.mark.parametrize(("function", "file"), LISTED)
def test_every_function_of_the_way_is_where_the_page_says(function: str, file: str) -> None:
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    assert callable(reduce(getattr, function.split("."), module))


def callers(frame: FrameType | None) -> list[tuple[str, str]]:
    """The functions of the server on the stack, outermost first, with their files."""
    found: list[tuple[str, str]] = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(str(ROOT / "server")):
            found.insert(0, (code.co_qualname, str(Path(code.co_filename).relative_to(ROOT))))
        frame = frame.f_back
    return found


def test_nothing_stands_between_the_functions_that_the_page_lists(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, stack = client.app_state["service"].engine, list[tuple[str, str]]()
    commands: SimpleQueue[object] = engine._commands

    class Commands:
        get = commands.get

        def put(self, command: object) -> None:
            if isinstance(command, Submit):
                stack.extend(callers(sys._getframe(1)))
            commands.put(command)

    monkeypatch.setattr(engine, "_commands", Commands())
    messages = [{"role": "user", "content": "say hi"}]
    response = client.post("/v1/chat/completions", json={"model": "pair", "messages": messages})
    assert response.status_code == 200
    steps = ("admission", "prepare_chat", "EngineClient._write")  # done before, or in a thread
    assert stack == [entry for entry in LISTED if entry[0] not in steps]


def test_admission_is_checked_before_the_body_and_before_the_engine(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, steps = client.app_state["service"], list[str]()
    admit, read, submit = service.admit, chat.read_body, service.engine.submit

    def noting(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            steps.append(step)
            return function(*arguments)

        return call

    monkeypatch.setattr(service, "admit", noting("admit", admit))
    monkeypatch.setattr(chat, "read_body", noting("read", read))
    monkeypatch.setattr(service.engine, "submit", noting("submit", submit))
    messages = [{"role": "user", "content": "say hi"}]
    response = client.post("/v1/chat/completions", json={"model": "pair", "messages": messages})
    assert response.status_code == 200
    assert steps == ["admit", "read", "admit", "submit"]
