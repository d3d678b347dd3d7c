"""Tool calls in an answer's text: the text as it comes in, content and calls out.

    text ──<tool_call>──▶ head ──{"name": …, "arguments":──▶ arguments ──▶ tail
      ▲                     └── no call ──┐                                  │
      └───────────────────────────────────┴───────────</tool_call>───────────┘

The form is that of Qwen and Hermes. A call is certain once its name is known and its arguments
begin; from there on they are given out as they come, as the model writes them. What looks like a
call and is none stays content. The tags, and the blanks around a call, belong to neither side;
nothing else is lost, and nothing depends on how the text was cut.
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
class CallDelta:
    """A new call, which has an id and a name, or more of one's arguments."""

    index: int
    arguments: str = ""  # JSON, as the model writes it
    name: str | None = None
    id: str | None = None

    @property
    def on_wire(self) -> dict[str, object]:
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class Said:
    """The content and the calls that became certain."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def then(self, other: "Said") -> "Said":
        return Said(self.content + other.content, self.calls + other.calls)


class _State(Enum):
    TEXT = auto()
    HEAD = auto()  # behind an opening tag; may still turn out to be text
    ARGUMENTS = auto()
    TAIL = auto()  # behind the arguments


def new_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


class ToolCalls:
    """Feed it the content of one answer, then `finish` it once."""

    def __init__(self, make_id: Callable[[], str] = new_call_id) -> None:
        self.count = 0  # calls that began
        self._make_id = make_id
        self._state = _State.TEXT
        self._held = ""
        self._behind_call = False  # nothing but blanks came since
        self._object = _JsonObject()

    @property
    def complete(self) -> bool:
        """Whether there are calls, and none that is cut off."""
        return self.count > 0 and self._state is not _State.ARGUMENTS

    def feed(self, text: str) -> Said:
        self._held += text
        said = Said()
        step = {
            _State.TEXT: self._text,
            _State.HEAD: self._head,
            _State.ARGUMENTS: self._arguments,
            _State.TAIL: self._tail,
        }
        while step[self._state](said):
            pass
        return said

    def finish(self) -> Said:
        """What was held back, now that no more text comes."""
        said = Said()
        if self._state is _State.HEAD and self._whole_call(said, self._held, len(self._held)):
            return said
        if self._state in (_State.TEXT, _State.HEAD):
            self._give(said, len(self._held))
        return said

    # --- one state each; True where more can be told from what is held ---------------------------

    def _text(self, said: Said) -> bool:
        start = self._held.find(TOOL_CALL)
        end = start
        if start < 0:
            end = len(self._held) - unfinished_length(self._held, [TOOL_CALL])
        self._give(said, len(self._held[:end].rstrip()))
        if start >= 0:
            self._state = _State.HEAD
        return start >= 0

    def _head(self, said: Said) -> bool:
        begin = self._held.index(TOOL_CALL) + len(TOOL_CALL)
        body = self._held[begin:].lstrip()
        close = self._held.find(TOOL_CALL_END, begin)
        match = _HEAD.match(self._held, begin)
        if match is not None and (close < 0 or match.end() <= close):
            name = _string(match[1])
            if name is not None:
                self._begin(said, name)
                self._held = self._held[match.end() :]
                self._state, self._object = _State.ARGUMENTS, _JsonObject()
                return True
        if close >= 0 and self._whole_call(said, self._held[:close], close + len(TOOL_CALL_END)):
            return True
        if close < 0 and (not body or (body.startswith("{") and match is None)):
            return False
        self._state = _State.TEXT
        self._give(said, begin)  # it was no call: the tag is text, and so is what follows
        return True

    def _arguments(self, said: Said) -> bool:
        end = self._object.end_in(self._held)
        piece = self._held[:end]
        if piece:
            said.calls.append(CallDelta(self.count - 1, piece))
        self._held = self._held[len(piece) :]
        if end is not None:
            self._state = _State.TAIL
        return end is not None

    def _tail(self, said: Said) -> bool:
        match = _TAIL.match(self._held)
        if match is None and TOOL_CALL_END.startswith(
            self._held.lstrip().removeprefix("}").lstrip()
        ):
            return False
        self._end(0 if match is None else match.end())
        return True

    # --- what they do ----------------------------------------------------------------------------

    def _give(self, said: Said, end: int) -> None:
        """Content up to `end`; behind a call it begins with its first letter."""
        text, self._held = self._held[:end], self._held[end:]
        if self._behind_call:
            text = text.lstrip()
        if text:
            said.content += text
            self._behind_call = False

    def _begin(self, said: Said, name: str) -> None:
        said.calls.append(CallDelta(self.count, name=name, id=self._make_id()))
        self.count += 1

    def _end(self, taken: int) -> None:
        self._held = self._held[taken:]
        self._state, self._behind_call = _State.TEXT, True

    def _whole_call(self, said: Said, text: str, taken: int) -> bool:
        """A call whose parts stand in another order, which is told from the whole of it."""
        call = _call(text[text.index(TOOL_CALL) + len(TOOL_CALL) :])
        if call is None:
            return False
        name, arguments = call
        self._begin(said, name)
        said.calls.append(CallDelta(self.count - 1, arguments))
        self._end(taken)
        return True


class _JsonObject:
    """Finds the end of an object whose text comes in pieces, and trusts it otherwise."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end_in(self, text: str) -> int | None:
        """The place behind the object, or of a tag that ends it; None where it goes on."""
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
    """Name and arguments of a call that is complete; None where it is none."""
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


def joined(deltas: Sequence[CallDelta]) -> list[dict[str, object]]:
    """The calls of a whole answer, as the wire has them."""
    calls: list[dict[str, object]] = []
    for index in sorted({delta.index for delta in deltas}):
        own = [delta for delta in deltas if delta.index == index]
        arguments = "".join(delta.arguments for delta in own)
        function = {"name": own[0].name, "arguments": arguments}
        calls.append({"id": own[0].id, "type": "function", "function": function})
    return calls
