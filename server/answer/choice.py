"""One choice of an answer: takes token events and returns answer chunks.

The order of the work is decided here: detokenize, split reasoning from content, hold back stop
strings, find tool calls. A choice does not know how its chunks are written, or who reads them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mi_runtime.request import FinishReason, RequestRejected, TokenEvent
from server.answer.echo import Echo
from server.answer.logprobs import WriteLogprobs
from server.ops.metrics import RequestMeter
from server.text.reasoning_parser import Split, Splitter
from server.text.stop_strings import StopStrings
from server.text.tool_parser import ToolCallDelta, ToolCallParser
from server.text.vocabulary import IncrementalDetokenizer, Vocabulary
from server.wire.errors import ApiError, InvalidRequest, RequestFailed

ObserveReasoning = Callable[[int, bool], None]
"""Receives the reasoning tokens of an ended choice, and whether its think block was truncated."""


@dataclass(slots=True)
class AnswerChunk:
    """What one token added to one choice."""

    index: int  # of the choice
    content: str = ""
    reasoning: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None  # set on a choice's last chunk only
    repeats_reasoning: bool = False  # content is the text that was reasoning until now
    forced_close: bool = False  # the engine closed the block; set on the last chunk only
    calls: list[ToolCallDelta] = field(default_factory=list)


class Choice:
    """The state of one choice while its tokens arrive."""

    def __init__(
        self,
        index: int,
        *,
        vocabulary: Vocabulary,
        splitter: Splitter,
        stop: Sequence[str],
        meter: RequestMeter,
        write_logprobs: WriteLogprobs | None = None,
        echo: Echo | None = None,
        observe: ObserveReasoning | None = None,
        tools: bool = False,
        field_names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Makes a choice without tokens.

        `write_logprobs` is None if the request wants no log-probabilities. `echo` is the prompt if
        the first chunk begins with it. `tools` says whether the model may call tools.
        `field_names` has the request's names of the engine's fields, where they differ.
        """
        self.index = index
        self.meter = meter
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.cached_tokens = 0
        self.forced_close = False
        self._truncated_block = False
        self._field_names = field_names
        self._observe = observe
        self._vocabulary = vocabulary
        self._text = IncrementalDetokenizer(vocabulary)
        self._splitter = splitter
        self._stop = StopStrings(stop)
        self._calls = ToolCallParser() if tools else None
        self._write_logprobs = write_logprobs
        self._echo = echo  # None once it was written
        self._characters = 0 if echo is None else len(echo.text)  # before the next token
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is still held back

    @property
    def stopped_by_string(self) -> bool:
        """Whether a stop string ended the answer; the engine does not notice that."""
        return self._stop.hit

    def take(self, at: float, event: TokenEvent) -> AnswerChunk | None:
        """Returns the chunk that an event makes, if any. `at` is its time by `time.perf_counter`.

        Raises `RequestFailed` if the engine failed or aborted the request, `InvalidRequest` if it
        rejected it.
        """
        text = self._count(event)
        ended = event.finish_reason is not None
        split = self._end(text, event) if ended else self._splitter.feed(text, event)
        if event.token_id is not None:
            self.meter.token(at, queue_seconds=event.queue_seconds, answers=bool(split.content))
        content = self._stop.feed(split.content)
        if self._stop.hit:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            content += self._stop.finish()
        chunk = self._chunk(split, content)
        return chunk if self._echo is None else self._with_echo(chunk, event)

    def close(self, unfinished: str) -> None:
        """Records the end, with `unfinished` as the reason if the choice has no finish reason."""
        self.meter.close(
            self.finish_reason or unfinished,
            generation_tokens=self.completion_tokens,
            reasoning_tokens=self.reasoning_tokens,
        )
        if self.finish_reason is not None and self._observe is not None:
            self._observe(self.reasoning_tokens, self.forced_close or self._truncated_block)

    def _count(self, event: TokenEvent) -> str:
        """Counts the token and returns its text; the text of an ending token is not shown."""
        token_id = event.token_id
        if token_id is None:
            return ""
        self.completion_tokens += 1
        self.cached_tokens = event.cached_tokens
        self.forced_close = event.forced_close
        self.reasoning_tokens = event.reasoning_tokens
        if self._write_logprobs is not None and event.logprobs is not None:
            entry = self._write_logprobs(token_id, event.logprobs, self._characters)
            self._logprobs.append(entry)
        text = "" if event.finish_reason is FinishReason.STOP else self._text.feed(token_id)
        self._characters += len(text)
        return text

    def _end(self, text: str, event: TokenEvent) -> Split:
        if event.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise self._failure(event)
        self.finish_reason = "length" if event.finish_reason is FinishReason.LENGTH else "stop"
        split = self._splitter.feed(text, event)
        split = split.then(self._splitter.feed(self._text.finish()))
        self._truncated_block = self.finish_reason == "length" and self._splitter.inside_block
        split = split.then(self._splitter.finish(by_length=self.finish_reason == "length"))
        if split.repeats_reasoning:
            self.reasoning_tokens = 0
        return split

    def _failure(self, event: TokenEvent) -> ApiError:
        """Returns the error that a client gets for an engine request that ended with one."""
        error = event.error
        if isinstance(error, RequestRejected):
            param = self._field_names.get(error.param or "", error.param)
            return InvalidRequest(str(error), param=param, code=error.code)
        return RequestFailed(error or "The engine aborted the request")

    def _chunk(self, split: Split, content: str) -> AnswerChunk | None:
        calls: list[ToolCallDelta] = []
        if self._calls is not None:
            content, calls = self._split_calls(content, self._calls)
        if not (content or calls or split.reasoning or self.finish_reason):
            return None
        logprobs, self._logprobs = self._logprobs, []
        return AnswerChunk(
            self.index,
            content,
            split.reasoning,
            logprobs,
            self.finish_reason,
            split.repeats_reasoning,
            forced_close=self.forced_close and self.finish_reason is not None,
            calls=calls,
        )

    def _split_calls(self, text: str, parser: ToolCallParser) -> tuple[str, list[ToolCallDelta]]:
        """Returns the content and the tool calls in `text`."""
        split = parser.feed(text)
        if self.finish_reason is not None:
            split = split.then(parser.finish())
            if parser.complete and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        return split.content, split.calls

    def _with_echo(self, chunk: AnswerChunk | None, event: TokenEvent) -> AnswerChunk:
        """Puts the prompt and its log-probabilities before the first chunk."""
        assert self._echo is not None
        echo, self._echo = self._echo, None
        chunk = chunk or AnswerChunk(self.index)
        chunk.content = echo.text + chunk.content
        if self._write_logprobs is not None and event.prompt_logprobs is not None:
            scores = echo.logprobs(event.prompt_logprobs, self._write_logprobs, self._vocabulary)
            chunk.logprobs = scores + chunk.logprobs
        return chunk
