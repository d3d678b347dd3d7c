"""An answer: the choices of one request, and the chunks that they produce as events arrive."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mi_runtime.request import TokenEvent
from server.answer.choice import AnswerChunk, Choice
from server.engine.generation import Generation
from server.ops.request_log import RequestNotes
from server.routing.routing_decision import RoutingDecision
from server.wire.errors import ApiError, DeadlineExceeded


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What is known about an answer before its first token."""

    id: str
    created: int  # seconds since 1970
    model: str
    system_fingerprint: str
    decision: RoutingDecision
    prompt_tokens: int  # each prompt once, however many choices it has
    prompt_count: int = 1  # each has the same number of choices
    include_usage: bool = False  # in a stream
    include_reasoning: bool = True
    logprobs: bool = False

    def fields(self, object_type: str) -> dict[str, Any]:
        """Returns the first fields of an answer or chunk of type `object_type`."""
        return {
            "id": self.id,
            "object": object_type,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }

    def routing_body(self, *, forced_close: bool) -> dict[str, Any]:
        """Returns the `routing` of an answer; `forced_close` if the engine closed a think block."""
        return self.decision.body | ({"forced_close": True} if forced_close else {})


class Answer:
    """The choices of one request. Iterate `chunks` once, to its end or until the client leaves."""

    def __init__(
        self,
        head: AnswerHead,
        choices: Mapping[str, Choice],
        generation: Generation,
        notes: RequestNotes,
        charge: Callable[[int], None],
    ) -> None:
        """Takes the choices by the id of their engine request.

        At the end it fills in `notes`, and `charge` takes the answer's tokens from the caller's
        quota.
        """
        self.head = head
        self.generation = generation
        self._choices = choices
        self._notes = notes
        self._charge = charge

    @property
    def choices(self) -> Sequence[Choice]:
        return list(self._choices.values())

    @property
    def forced_close(self) -> bool:
        """Whether the engine closed the think block of any choice."""
        return any(choice.forced_close for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.completion_tokens for choice in self.choices)

    @property
    def usage(self) -> dict[str, Any]:
        """The `usage` of the answer so far."""
        choices, completion_tokens = self.choices, self.completion_tokens
        first_of_each_prompt = choices[:: len(choices) // self.head.prompt_count]
        cached_tokens = sum(choice.cached_tokens for choice in first_of_each_prompt)
        reasoning_tokens = sum(choice.reasoning_tokens for choice in choices)
        return {
            "prompt_tokens": self.head.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.head.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
        }

    async def chunks(
        self, *, wake_after: float | None = None
    ) -> AsyncGenerator[list[AnswerChunk], None]:
        """Yields the chunks that arrived, and an empty list if none did for `wake_after` seconds.

        Raises `ApiError` if a choice or the engine failed, `ClientLeft` if the client disconnected.
        """
        alarm = _Alarm(self.generation, wake_after)
        unfinished = "abort"
        try:
            with self.generation:
                while self.generation.is_open:
                    events = await self.generation.take()
                    alarm.postpone()
                    taken = [self._take(at, event) for at, event in events]
                    chunks = [chunk for chunk in taken if chunk is not None]
                    if chunks or not events:
                        yield chunks
        except ApiError as error:
            unfinished = "deadline" if isinstance(error, DeadlineExceeded) else "error"
            self._notes.fields["error"] = error.code
            raise
        finally:
            alarm.cancel()
            self._close(unfinished)

    def _take(self, at: float, event: TokenEvent) -> AnswerChunk | None:
        choice = self._choices[event.request_id]
        if choice.stopped_by_string:
            return None
        chunk = choice.take(at, event)
        if choice.stopped_by_string:
            self.generation.abort(event.request_id)
        return chunk

    def _close(self, unfinished: str) -> None:
        for choice in self.choices:
            choice.close(unfinished)
        self._charge(self.completion_tokens)
        self._notes.fields |= self._log_fields(unfinished)

    def _log_fields(self, unfinished: str) -> dict[str, Any]:
        """Returns the fields of the request's line in the log."""
        usage, prepare_seconds = self.usage, self._notes.fields.get("prepare_s", 0.0)
        return {
            "finish": ",".join(choice.finish_reason or unfinished for choice in self.choices),
            "prompt": usage["prompt_tokens"],
            "completion": usage["completion_tokens"],
            "reasoning": usage["completion_tokens_details"]["reasoning_tokens"],
            **({"forced_close": 1} if self.forced_close else {}),
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
            **self.choices[0].meter.stages(prepared=prepare_seconds),
        }


class _Alarm:
    """Wakes a generation that received no event for a while. It needs one timer for all tokens."""

    def __init__(self, generation: Generation, seconds: float | None) -> None:
        self._generation = generation
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._since = self._loop.time()
        if seconds is not None:
            self._timer = self._loop.call_later(seconds, self._ring)

    def postpone(self) -> None:
        self._since = self._loop.time()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _ring(self) -> None:
        assert self._seconds is not None
        left = self._since + self._seconds - self._loop.time()
        if left <= 0:
            self._generation.wake()
            left = self._seconds
        self._timer = self._loop.call_later(left, self._ring)
