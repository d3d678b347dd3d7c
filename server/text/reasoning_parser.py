"""Splits an answer's text into reasoning and content as its tokens arrive.

    start ──<think>──▶ block ──</think>──▶ content
      └────── other text ──────────────────▲

An answer begins in `block` if the prompt opened one, or else in `start`, where the model may open a
block after nothing but whitespace. A model may repeat the tag of a block that was closed for it:
one closing tag that follows the block after nothing but whitespace belongs to the block's end. Tags
anywhere else are plain text. The tags and the line breaks next to them are dropped.
Nothing else is lost or repeated, with one intended exception: a block that was never closed, in an
answer that ended by itself, was the answer, so its text is repeated at the end as content.

Where the tags are single tokens, the engine tracks the block and reports the phase with each token
event (`TokenEvent.phase`); `TokenSplitter` only reads it. Where the tags are spelled by several
tokens, the engine tracks no block, and `TextSplitter` searches the text for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from mi_runtime.request import Phase, TokenEvent
from server.text.string_matching import first_match, unfinished_length

THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"
TOOL_CALL: Final = "<tool_call>"
"""Merged models write it where `</think>` belongs (arXiv 2510.10977, Table 6)."""
TOOL_CALL_END: Final = "</tool_call>"


@dataclass(slots=True)
class Split:
    """The text that became certain; either part may be empty."""

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
    """Splits one answer: `feed` it each piece of text, then `finish` it once."""

    @property
    def inside_block(self) -> bool: ...

    def feed(self, text: str, event: TokenEvent | None = None) -> Split:
        """Returns the text that became certain.

        `event` is the event that `text` came with, None for text left over from earlier tokens.
        """

    def finish(self, *, by_length: bool) -> Split:
        """Returns the text that was held back; `by_length` says that the answer was cut off."""


class TokenSplitter:
    """Splits at tags that are single tokens, when the engine reports that the phase changes."""

    def __init__(self, *, opened: bool, tags: Mapping[int, str]) -> None:
        """Takes whether the prompt opened the block, and the text of each tag by token id."""
        self._phase: int = Phase.INSIDE if opened else Phase.OUTSIDE
        self._tags = tags
        self._sides = _Sides(opened=opened)
        self._whitespace = ""  # before a block that may still open

    @property
    def inside_block(self) -> bool:
        return self._phase == Phase.INSIDE

    def feed(self, text: str, event: TokenEvent | None = None) -> Split:
        before = self._phase
        if event is None or event.phase == before:
            return self._feed_same_phase(text, event)
        self._phase = event.phase
        if before == Phase.INSIDE:
            return self._sides.close(text.removesuffix(self._tag_of(event)))
        if event.phase == Phase.INSIDE:
            self._sides = _Sides(opened=True)
            return Split()
        return self._sides.feed(self._whitespace + text)

    def finish(self, *, by_length: bool) -> Split:
        if self._phase == Phase.OUTSIDE:
            return Split(content=self._whitespace)
        return self._sides.finish(by_length=by_length)

    def _feed_same_phase(self, text: str, event: TokenEvent | None) -> Split:
        if self._phase == Phase.OUTSIDE:
            self._whitespace += text
            return Split()
        # A closing tag that ended the answer as a stop token comes without text.
        if event is not None and self._tag_of(event) == THINK_CLOSE and text.endswith(THINK_CLOSE):
            last = self._sides.feed(text.removesuffix(THINK_CLOSE))
            return last.then(self._sides.feed_closing_tag())
        return self._sides.feed(text)

    def _tag_of(self, event: TokenEvent) -> str:
        """Returns the tag that the event's token is, or an empty text."""
        return "" if event.token_id is None else self._tags.get(event.token_id, "")


class TextSplitter:
    """Splits at tags that several tokens spell. Only the prompt can open a block."""

    def __init__(self, *, opened: bool, closing: Sequence[str]) -> None:
        self._closing = closing
        self._sides = _Sides(opened=opened)
        self._held = ""  # may be the beginning of a tag

    @property
    def inside_block(self) -> bool:
        return not self._sides.closed

    def feed(self, text: str, event: TokenEvent | None = None) -> Split:
        text = self._held + text
        if self._sides.closed:
            return self._feed_content(text)
        close = first_match(text, self._closing)
        if close is not None:
            self._held = ""
            last = self._sides.close(text[: close.start])
            return last.then(self._feed_content(text[close.end :]))
        certain = len(text) - unfinished_length(text, self._closing)
        self._held = text[certain:]
        return self._sides.feed(text[:certain])

    def finish(self, *, by_length: bool) -> Split:
        return self._sides.feed(self._held).then(self._sides.finish(by_length=by_length))

    def _feed_content(self, text: str) -> Split:
        """Feeds content, which may begin with one more closing tag."""
        self._held = ""
        if not self._sides.at_close:
            return self._sides.feed(text)
        start = text.lstrip()
        if start.startswith(THINK_CLOSE):
            whitespace = self._sides.feed(text[: len(text) - len(start)])
            tag = self._sides.feed_closing_tag()
            return whitespace.then(tag).then(self._sides.feed(start[len(THINK_CLOSE) :]))
        if THINK_CLOSE.startswith(start):
            self._held = text
            return Split()
        return self._sides.feed(text)


class PlainText:
    """Splits nothing: after a raw prompt there is no block, and tags are text."""

    inside_block = False

    def feed(self, text: str, event: TokenEvent | None = None) -> Split:
        return Split(content=text)

    def finish(self, *, by_length: bool) -> Split:
        return Split()


class _Sides:
    """Collects reasoning while the block is open and content after it, and drops the line breaks
    next to the tags."""

    def __init__(self, *, opened: bool) -> None:
        self.closed = not opened
        self.at_close = False  # only whitespace came since the block closed; one more tag may come
        self._at_tag = opened  # nothing came since a tag
        self._held = ""  # line breaks that a closing tag may follow, or whitespace after one
        self._reasoning = ""  # returned so far

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
        """Feeds the last text of the block."""
        last = self.feed(text)
        self.closed, self.at_close, self._at_tag, self._held = True, True, True, ""
        return last

    def feed_closing_tag(self) -> Split:
        """Feeds a closing tag that stands in the content."""
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
