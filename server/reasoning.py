"""Where reasoning ends: a machine that splits an answer's text into reasoning and content.

    start ──<think>──▶ block ──</think>──▶ content
      └────── other text ──────────────────▲

It begins in `block` if the prompt opened one, in `start` if the model may open one itself (after
optional whitespace), in `content` if the model knows no tags. Tags anywhere else are plain text.
The tags, and the line breaks next to them, belong to neither side. Any cutting of a text into
pieces gives the same result as the whole; nothing is lost or said twice, with one exception that
is meant: a block that was never closed, in an answer that ended by itself, was the answer. Its
text comes once more at the end, as content.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from server.matching import first_match, unfinished_length

THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"
TOOL_CALL: Final = "<tool_call>"
"""Merged models write it where `</think>` belongs (arXiv 2510.10977, Table 6)."""


@dataclass(slots=True)
class Split:
    """The text that became certain: either part may be empty."""

    reasoning: str = ""
    content: str = ""
    repeats_reasoning: bool = False  # content is the text that was reasoning until now


class _State(Enum):
    START = auto()
    BLOCK = auto()
    CONTENT = auto()


class ReasoningSplitter:
    """Feed it the pieces of one answer, then `finish` it once."""

    def __init__(self, state: _State, closing: Sequence[str]) -> None:
        self._state = state
        self._closing = closing
        self._held = ""  # may be part of a tag, or line breaks next to one
        self._at_seam = state is _State.BLOCK  # directly behind a tag
        self._block = ""  # the reasoning given out so far

    @classmethod
    def of_prompt(cls, *, opened: bool, closing: Sequence[str]) -> "ReasoningSplitter":
        """For a model with think tags, whose prompt did or did not open a block."""
        return cls(_State.BLOCK if opened else _State.START, closing)

    @classmethod
    def without_tags(cls) -> "ReasoningSplitter":
        """For a model that knows none: all is content."""
        return cls(_State.CONTENT, ())

    @property
    def inside_block(self) -> bool:
        return self._state is _State.BLOCK

    def feed(self, text: str) -> Split:
        if self._state is _State.CONTENT and not self._at_seam:
            return Split(content=text)
        text = self._held + text
        self._held = ""
        if self._state is _State.START:
            text = self._open(text)
        split = Split()
        if self._state is _State.BLOCK:
            split.reasoning, text = self._read_block(text)
            self._block += split.reasoning
        if self._state is _State.CONTENT:
            split.content = self._behind_seam(text)
        return split

    def finish(self, *, by_length: bool) -> Split:
        """What was held back, now that no more text comes. `by_length`: the answer was cut."""
        held, self._held = self._held, ""
        if self._state is not _State.BLOCK:
            return Split(content=held)
        if by_length:
            return Split(reasoning=held)
        return Split(content=self._block + held, repeats_reasoning=True)

    def _open(self, text: str) -> str:
        """Decide whether the answer begins with a block; returns the text behind the decision."""
        said = text.lstrip()
        if said.startswith(THINK_OPEN):
            self._state, self._at_seam = _State.BLOCK, True
            return said[len(THINK_OPEN) :]
        if THINK_OPEN.startswith(said):
            self._held = text
            return ""
        self._state = _State.CONTENT
        return text

    def _read_block(self, text: str) -> tuple[str, str]:
        """The block's certain text, and the text behind it if it was closed."""
        text = self._behind_seam(text)
        close = first_match(text, self._closing)
        if close is not None:
            self._state, self._at_seam = _State.CONTENT, True
            return text[: close.start].rstrip("\n"), text[close.end :]
        certain = text[: len(text) - unfinished_length(text, self._closing)].rstrip("\n")
        self._held = text[len(certain) :]
        return certain, ""

    def _behind_seam(self, text: str) -> str:
        if self._at_seam:
            text = text.lstrip("\n")
            self._at_seam = not text
        return text
