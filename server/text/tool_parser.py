"""Separates the tool calls in an answer's text from its content, as the text arrives.

    text ──<tool_call>──▶ head ──{"name": …, "arguments":──▶ arguments ──▶ tail
      ▲                     └── no call ──┐                                  │
      └───────────────────────────────────┴───────────</tool_call>───────────┘

The format is that of Qwen and Hermes. A call is certain once its name is known and its arguments
begin; from then on arguments are returned as they arrive, exactly as the model writes them. Text
that looks like a call but is none stays content. The tags and the white space around a call are
dropped; nothing else is lost, and the result does not depend on how the text was cut.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final
from uuid import uuid4

from server.text.reasoning_parser import TOOL_CALL, TOOL_CALL_END
from server.text.string_matching import unfinished_length

_HEAD: Final = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL
)
_TAIL: Final = re.compile(rf"\s*\}}?\s*{TOOL_CALL_END}")


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The start of a call, with id and name, or the next piece of its arguments."""

    index: int
    arguments: str = ""  # JSON, as the model writes it
    name: str | None = None
    id: str | None = None

    @property
    def on_wire(self) -> dict[str, object]:
        """The object that a stream sends."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class ParsedText:
    """The content and the pieces of calls that became certain."""

    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)

    def then(self, other: "ParsedText") -> "ParsedText":
        return ParsedText(self.content + other.content, self.calls + other.calls)


class _State(Enum):
    TEXT = auto()
    HEAD = auto()  # after an opening tag; may still turn out to be text
    ARGUMENTS = auto()
    TAIL = auto()  # after the arguments


def new_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


class ToolCallParser:
    """Takes the content of one answer piece by piece, then `finish` once."""

    def __init__(self, make_id: Callable[[], str] = new_call_id) -> None:
        self.count = 0  # calls that began
        self._make_id = make_id
        self._state = _State.TEXT
        self._held = ""
        self._after_call = False  # only white space came since
        self._object = _JsonObject()

    @property
    def complete(self) -> bool:
        """Whether there are calls, and none of them is cut off."""
        return self.count > 0 and self._state is not _State.ARGUMENTS

    def feed(self, text: str) -> ParsedText:
        """Returns what becomes certain with the next piece of content."""
        self._held += text
        parsed = ParsedText()
        step = {
            _State.TEXT: self._text,
            _State.HEAD: self._head,
            _State.ARGUMENTS: self._arguments,
            _State.TAIL: self._tail,
        }
        while step[self._state](parsed):
            pass
        return parsed

    def finish(self) -> ParsedText:
        """Returns the text held back, when no more text comes."""
        parsed = ParsedText()
        if self._state is _State.HEAD and self._complete_call(parsed, self._held, len(self._held)):
            return parsed
        if self._state in (_State.TEXT, _State.HEAD):
            self._give(parsed, len(self._held))
        return parsed

    # One method for each state; it returns whether the held text can be read further.

    def _text(self, parsed: ParsedText) -> bool:
        start = self._held.find(TOOL_CALL)
        end = start
        if start < 0:
            end = len(self._held) - unfinished_length(self._held, [TOOL_CALL])
        self._give(parsed, len(self._held[:end].rstrip()))
        if start >= 0:
            self._state = _State.HEAD
        return start >= 0

    def _head(self, parsed: ParsedText) -> bool:
        begin = self._held.index(TOOL_CALL) + len(TOOL_CALL)
        body = self._held[begin:].lstrip()
        close = self._held.find(TOOL_CALL_END, begin)
        match = _HEAD.match(self._held, begin)
        if match is not None and (close < 0 or match.end() <= close):
            name = _string(match[1])
            if name is not None:
                self._begin(parsed, name)
                self._held = self._held[match.end() :]
                self._state, self._object = _State.ARGUMENTS, _JsonObject()
                return True
        if close >= 0 and self._complete_call(
            parsed, self._held[:close], close + len(TOOL_CALL_END)
        ):
            return True
        if close < 0 and (not body or (body.startswith("{") and match is None)):
            return False
        self._state = _State.TEXT
        self._give(parsed, begin)  # not a call: the tag is content
        return True

    def _arguments(self, parsed: ParsedText) -> bool:
        end = self._object.end_in(self._held)
        piece = self._held[:end]
        if piece:
            parsed.calls.append(ToolCallDelta(self.count - 1, piece))
        self._held = self._held[len(piece) :]
        if end is not None:
            self._state = _State.TAIL
        return end is not None

    def _tail(self, parsed: ParsedText) -> bool:
        match = _TAIL.match(self._held)
        if match is None and TOOL_CALL_END.startswith(
            self._held.lstrip().removeprefix("}").lstrip()
        ):
            return False
        self._end(0 if match is None else match.end())
        return True

    def _give(self, parsed: ParsedText, end: int) -> None:
        """Adds held text up to `end` to the content, after a call without leading white space."""
        text, self._held = self._held[:end], self._held[end:]
        if self._after_call:
            text = text.lstrip()
        if text:
            parsed.content += text
            self._after_call = False

    def _begin(self, parsed: ParsedText, name: str) -> None:
        parsed.calls.append(ToolCallDelta(self.count, name=name, id=self._make_id()))
        self.count += 1

    def _end(self, taken: int) -> None:
        self._held = self._held[taken:]
        self._state, self._after_call = _State.TEXT, True

    def _complete_call(self, parsed: ParsedText, text: str, taken: int) -> bool:
        """Reads a complete call, whose keys may be in any order; returns whether it is one."""
        call = _call(text[text.index(TOOL_CALL) + len(TOOL_CALL) :])
        if call is None:
            return False
        name, arguments = call
        self._begin(parsed, name)
        parsed.calls.append(ToolCallDelta(self.count - 1, arguments))
        self._end(taken)
        return True


class _JsonObject:
    """Finds the end of a JSON object whose text comes in pieces; it does not check the rest."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end_in(self, text: str) -> int | None:
        """Returns the offset at which the object ends or a tag cuts it off; None if it goes on."""
        for place, letter in enumerate(text):
            if self._in_string:
                self._take_in_string(letter)
            elif letter == "<":
                return place
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None

    def _take_in_string(self, letter: str) -> None:
        if self._escaped:
            self._escaped = False
        elif letter == "\\":
            self._escaped = True
        elif letter == '"':
            self._in_string = False


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _call(text: str) -> tuple[str, str] | None:
    """Returns name and arguments of a complete call, or None if the text is not one."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict):
        return None
    name, arguments = call.get("name"), call.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(name, str) or not name or not isinstance(arguments, str):
        return None
    return name, arguments


def join_deltas(deltas: Sequence[ToolCallDelta]) -> list[dict[str, object]]:
    """Returns the `tool_calls` of a complete answer."""
    calls: list[dict[str, object]] = []
    for index in sorted({delta.index for delta in deltas}):
        own = [delta for delta in deltas if delta.index == index]
        arguments = "".join(delta.arguments for delta in own)
        function = {"name": own[0].name, "arguments": arguments}
        calls.append({"id": own[0].id, "type": "function", "function": function})
    return calls
