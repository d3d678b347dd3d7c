"""Where reasoning ends: an answer's text, split into reasoning and content as its tokens come.

    start ──<think>──▶ block ──</think>──▶ content
      └────── other text ──────────────────▲

It begins in `block` if the prompt opened one, else in `start`, where the model may open one itself
behind blanks. A model whose block was closed for it may close it once more: one closing tag with
only blanks before it belongs to the block's end. Tags anywhere else are plain text. The tags, and
the line breaks next to them, belong to neither side. Nothing is lost or said twice, with one
exception that is meant: a block that was never closed, in an answer that ended by itself, was the
answer. Its text comes once more at the end, as content.

Where the tags are tokens, the engine's own machine (`ThinkingState`) tells the states, so that both
processes agree about every token. Where they are not, the engine follows no block, and text does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from mi_runtime.scheduling.thinking import Phase, ThinkingState
from server.text.string_matching import first_match, unfinished_length

THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"
TOOL_CALL: Final = "<tool_call>"
"""Merged models write it where `</think>` belongs (arXiv 2510.10977, Table 6)."""
TOOL_CALL_END: Final = "</tool_call>"


@dataclass(slots=True)
class Split:
    """The text that became certain: either part may be empty."""

    reasoning: str = ""
    content: str = ""
    repeats_reasoning: bool = False  # content is the text that was reasoning until now

    def then(self, other: "Split") -> "Split":
        return Split(
            self.reasoning + other.reasoning,
            self.content + other.content,
            self.repeats_reasoning or other.repeats_reasoning,
        )


class Splitter(Protocol):
    """Feed it the pieces of one answer, then `finish` it once."""

    @property
    def inside_block(self) -> bool: ...

    def feed(self, text: str, token_id: int | None = None) -> Split:
        """The text that a token made certain; None: text that is left over."""

    def finish(self, *, by_length: bool) -> Split:
        """What was held back, now that no more text comes. `by_length`: the answer was cut."""


class TokenSplitter:
    """By token ids, as the engine does. `tags`: the text of those that are tags."""

    def __init__(self, thinking: ThinkingState, tags: Mapping[int, str]) -> None:
        self._thinking = thinking
        self._tags = tags
        self._sides = _Sides(opened=self.inside_block)
        self._blanks = ""  # before a block that may still open

    @property
    def inside_block(self) -> bool:
        return self._thinking.phase is Phase.INSIDE

    def feed(self, text: str, token_id: int | None = None) -> Split:
        before = self._thinking.phase
        if token_id is not None:
            self._thinking.observe(token_id)
        match before, self._thinking.phase:
            case Phase.OUTSIDE, Phase.OUTSIDE:
                self._blanks += text
                return Split()
            case Phase.OUTSIDE, Phase.CLOSED:
                return self._sides.feed(self._blanks + text)
            case Phase.OUTSIDE, Phase.INSIDE:
                self._sides = _Sides(opened=True)
                return Split()
            case Phase.INSIDE, Phase.CLOSED:
                assert token_id is not None
                return self._sides.close(text.removesuffix(self._tags[token_id]))
        is_tag = token_id is not None and self._tags.get(token_id) == THINK_CLOSE
        if is_tag and text.endswith(THINK_CLOSE):  # not where it ended the answer, unshown
            last = self._sides.feed(text.removesuffix(THINK_CLOSE))
            return last.then(self._sides.feed_closing_tag())
        return self._sides.feed(text)

    def finish(self, *, by_length: bool) -> Split:
        if self._thinking.phase is Phase.OUTSIDE:
            return Split(content=self._blanks)
        return self._sides.finish(by_length=by_length)


class TextSplitter:
    """By text, for tags that are spelled; only the prompt can open a block."""

    def __init__(self, *, opened: bool, closing: Sequence[str]) -> None:
        self._closing = closing
        self._sides = _Sides(opened=opened)
        self._held = ""  # may be the beginning of a tag

    @property
    def inside_block(self) -> bool:
        return not self._sides.closed

    def feed(self, text: str, token_id: int | None = None) -> Split:
        text = self._held + text
        if self._sides.closed:
            return self._feed_behind(text)
        close = first_match(text, self._closing)
        if close is not None:
            self._held = ""
            last = self._sides.close(text[: close.start])
            return last.then(self._feed_behind(text[close.end :]))
        certain = len(text) - unfinished_length(text, self._closing)
        self._held = text[certain:]
        return self._sides.feed(text[:certain])

    def finish(self, *, by_length: bool) -> Split:
        return self._sides.feed(self._held).then(self._sides.finish(by_length=by_length))

    def _feed_behind(self, text: str) -> Split:
        """Content, which may begin with one more closing tag."""
        self._held = ""
        if not self._sides.at_close:
            return self._sides.feed(text)
        start = text.lstrip()
        if start.startswith(THINK_CLOSE):
            blanks = self._sides.feed(text[: len(text) - len(start)])
            tag = self._sides.feed_closing_tag()
            return blanks.then(tag).then(self._sides.feed(start[len(THINK_CLOSE) :]))
        if THINK_CLOSE.startswith(start):
            self._held = text
            return Split()
        return self._sides.feed(text)


class PlainText:
    """Of a raw prompt: no block, and tags are text."""

    inside_block = False

    def feed(self, text: str, token_id: int | None = None) -> Split:
        return Split(content=text)

    def finish(self, *, by_length: bool) -> Split:
        return Split()


class _Sides:
    """Reasoning while the block is open, then content; without the line breaks next to tags."""

    def __init__(self, *, opened: bool) -> None:
        self.closed = not opened
        self.at_close = False  # only blanks came since the block closed; one more tag may come
        self._at_tag = opened  # directly behind one
        self._held = ""  # line breaks that the closing tag may follow; blanks behind it
        self._reasoning = ""  # given out so far

    def feed(self, text: str) -> Split:
        text = self._held + text
        if self.at_close and not text.strip():
            self._held = text
            return Split()
        self.at_close, self._held = False, ""
        if self._at_tag:
            text = text.lstrip("\n")
            self._at_tag = not text
        if self.closed:
            return Split(content=text)
        certain = text.rstrip("\n")
        self._held = text[len(certain) :]
        self._reasoning += certain
        return Split(reasoning=certain)

    def close(self, text: str) -> Split:
        """The last text of the block."""
        last = self.feed(text)
        self.closed, self.at_close, self._at_tag, self._held = True, True, True, ""
        return last

    def feed_closing_tag(self) -> Split:
        """A closing tag in the content."""
        if not self.at_close:
            return self.feed(THINK_CLOSE)
        self.at_close, self._held = False, ""
        return Split()

    def finish(self, *, by_length: bool) -> Split:
        if self.closed:
            return Split(content=self._held.lstrip("\n"))
        if by_length:
            return Split(reasoning=self._held)
        return Split(content=self._reasoning + self._held, repeats_reasoning=True)
