"""One choice of an answer: token events in, chunks of text out.

Knows the order of things: detokenize, split reasoning from content, hold back stop strings. Does
not know how a chunk is written on the wire, nor who reads it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mi_runtime.request import FinishReason, TokenEvent
from server.answer.logprobs import WriteLogprobs
from server.ops.metrics import RequestMeter
from server.text.reasoning_parser import Split, Splitter
from server.text.stop_strings import StopStrings
from server.text.tool_parser import CallDelta, ParsedText, ToolCallParser
from server.text.vocabulary import IncrementalDetokenizer, Vocabulary
from server.wire.errors import RequestFailed

Observe = Callable[[int, bool], None]
"""Told the reasoning tokens of a choice that ended, and whether its think block was cut."""


def unobserved(tokens: int, cut: bool) -> None:
    """Nobody wants to know."""


@dataclass(slots=True)
class Chunk:
    """What one token added to one choice."""

    index: int
    content: str = ""
    reasoning: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None  # set on a choice's last chunk only
    repeats_reasoning: bool = False  # content is the text that was reasoning until now
    forced_close: bool = False  # the engine closed the block; told on the last chunk
    calls: list[CallDelta] = field(default_factory=list)


class Choice:
    """The state of one choice while its tokens come."""

    def __init__(
        self,
        index: int,
        *,
        vocabulary: Vocabulary,
        splitter: Splitter,
        stop: Sequence[str],
        meter: RequestMeter,
        logprobs: WriteLogprobs | None = None,
        text_before: int = 0,
        observe: Observe = unobserved,
        tools: bool = False,
    ) -> None:
        """`logprobs`: how those of a token are written, if at all; `text_before`: characters that
        stand before the first token."""
        self.index = index
        self.meter = meter
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.cached_tokens = 0
        self.forced_close = False
        self._cut_in_block = False
        self._observe = observe
        self._text = IncrementalDetokenizer(vocabulary)
        self._splitter = splitter
        self._stop = StopStrings(stop)
        self._calls = ToolCallParser() if tools else None
        self._write_logprobs = logprobs
        self._characters = text_before
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is still held back

    @property
    def stopped_by_string(self) -> bool:
        """The answer is complete, though the engine does not know."""
        return self._stop.hit

    def take(self, at: float, event: TokenEvent) -> Chunk | None:
        """The chunk of an event that came at time `at`, if it makes one."""
        text = ""
        if event.token_id is not None:
            text = self._count(event, event.token_id)
        ended = event.finish_reason is not None
        split = self._end(text, event) if ended else self._splitter.feed(text, event.token_id)
        if event.token_id is not None:
            self.meter.token(at, queue_seconds=event.queue_seconds, answers=bool(split.content))
        content = self._stop.feed(split.content)
        if self._stop.hit:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            content += self._stop.finish()
        return self._chunk(split, self._without_calls(content))

    def close(self, unfinished: str) -> None:
        """Nothing more comes; `unfinished` says why, if the choice has no finish of its own."""
        self.meter.close(
            self.finish_reason or unfinished,
            generation_tokens=self.completion_tokens,
            reasoning_tokens=self.reasoning_tokens,
        )
        if self.finish_reason is not None:
            self._observe(self.reasoning_tokens, self.forced_close or self._cut_in_block)

    def _count(self, event: TokenEvent, token_id: int) -> str:
        """Count the token and return its text; that of an ending token is not shown."""
        self.completion_tokens += 1
        self.cached_tokens = event.cached_tokens
        self.forced_close = event.forced_close
        if self._splitter.inside_block:
            self.reasoning_tokens = event.reasoning_tokens
        if self._write_logprobs is not None and event.logprobs is not None:
            entry = self._write_logprobs(token_id, event.logprobs, self._characters)
            self._logprobs.append(entry)
        text = "" if event.finish_reason is FinishReason.STOP else self._text.feed(token_id)
        self._characters += len(text)
        return text

    def _end(self, text: str, event: TokenEvent) -> Split:
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise RequestFailed(event.error or "The engine gave the request up")
        self.finish_reason = "length" if event.finish_reason is FinishReason.LENGTH else "stop"
        split = self._splitter.feed(text, event.token_id)
        split = split.then(self._splitter.feed(self._text.finish()))
        self._cut_in_block = self.finish_reason == "length" and self._splitter.inside_block
        split = split.then(self._splitter.finish(by_length=self.finish_reason == "length"))
        if split.repeats_reasoning:
            self.reasoning_tokens = 0
        return split

    def _without_calls(self, content: str) -> ParsedText:
        """Content and tool calls, where the request has tools."""
        if self._calls is None:
            return ParsedText(content)
        said = self._calls.feed(content)
        if self.finish_reason is not None:
            said = said.then(self._calls.finish())
            if self._calls.complete and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        return said

    def _chunk(self, split: Split, said: ParsedText) -> Chunk | None:
        if not (said.content or said.calls or split.reasoning or self.finish_reason):
            return None
        logprobs, self._logprobs = self._logprobs, []
        return Chunk(
            self.index,
            said.content,
            split.reasoning,
            logprobs,
            self.finish_reason,
            split.repeats_reasoning,
            forced_close=self.forced_close and self.finish_reason is not None,
            calls=said.calls,
        )
