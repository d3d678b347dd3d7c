"""The requests that benchmarks stream from a server, and the answers as they were read."""

import json
import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from bench.models.workloads import NEW_TOKENS
from mi_runtime.embedded_pair.task import draw_questions
from server.config import EMBEDDED_NAME

STREAMS = 64


class ServerFailed(Exception):
    """The server did not start, did not answer as it should, or did not end."""


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """The request of one stream, identified by its seed."""

    text: str
    reasoning_lambda: float
    seed: int
    model: str = EMBEDDED_NAME
    new_tokens: int = NEW_TOKENS

    @property
    def body(self) -> bytes:
        """The body: a streamed greedy answer of exactly `new_tokens` tokens."""
        fields = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.text}],
            "reasoning_lambda": self.reasoning_lambda,
            "seed": self.seed,
            "max_tokens": self.new_tokens,
            "min_tokens": self.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(fields).encode()


@dataclass(frozen=True, slots=True)
class Streamed:
    """An answer as it was read: its bytes, and when they arrived on the monotonic clock."""

    request: StreamRequest
    sent: float
    pieces: tuple[tuple[float, bytes], ...]

    def check(self) -> None:
        """Raises `ServerFailed` unless all requested tokens arrived."""
        received = self.received
        usage: list[bytes] = re.findall(rb'"completion_tokens": ?(\d+)', received)
        if b"[DONE]" not in received or not usage or int(usage[-1]) != self.request.new_tokens:
            end = received[-500:].decode(errors="replace")
            raise ServerFailed(f"stream {self.request.seed} is not complete; it ends: {end!r}")

    @property
    def received(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    @property
    def moments(self) -> list[float]:
        """The times at which the events of content were completely read, one for each token."""
        ends = list(accumulate(len(piece) for _, piece in self.pieces))
        events = re.finditer(rb'"delta":\{"content":[^\n]*\n', self.received)
        return [self.pieces[bisect_left(ends, event.end())][0] for event in events]

    @property
    def text(self) -> str:
        """The content of all events."""
        events = re.findall(rb"^data: (\{.*\})", self.received, re.MULTILINE)
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        return "".join(choice["delta"].get("content", "") for choice in choices)


def stream_requests(
    seed: int,
    *,
    lambdas: Sequence[float],
    model: str = EMBEDDED_NAME,
    new_tokens: int = NEW_TOKENS,
) -> list[StreamRequest]:
    """Returns questions of the embedded pair's task, each with its λ."""
    questions = draw_questions(random.Random(seed), len(lambdas))
    return [
        StreamRequest(
            question.text, round(value, 2), seed * len(lambdas) + index, model, new_tokens
        )
        for index, (question, value) in enumerate(zip(questions, lambdas, strict=True))
    ]
