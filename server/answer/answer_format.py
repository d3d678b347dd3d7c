"""The interface of the two formats of answers, which `sse` and `json_answer` use.

A *payload* is the one field of a choice in which the formats differ: `delta` or `message` in chat,
`text` in `/v1/completions`.
"""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from server.answer.answer import AnswerHead
from server.answer.choice import AnswerChunk
from server.answer.logprobs import WriteLogprobs
from server.text.tool_parser import ToolCallDelta
from server.text.vocabulary import Vocabulary


@dataclass(slots=True)
class CompleteChoice:
    """The chunks of one choice, put together."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCallDelta] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: AnswerChunk) -> None:
        if chunk.repeats_reasoning:
            self.reasoning.clear()
        else:
            self.reasoning.append(chunk.reasoning)
        self.content.append(chunk.content)
        self.calls += chunk.calls
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason


class AnswerFormat(ABC):
    """How the answers of one route are written."""

    id_prefix: ClassVar[str]
    object_type: ClassVar[str]  # the field `object` of a complete answer
    chunk_type: ClassVar[str]  # the same of a chunk
    first_payload: ClassVar[str]  # JSON, in the first chunk of each choice
    empty_payload: ClassVar[str]  # JSON, in a chunk that adds no text

    @abstractmethod
    def logprobs_writer(self, vocabulary: Vocabulary) -> WriteLogprobs:
        """Returns the function that makes the entry of one token."""

    @abstractmethod
    def logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the `logprobs` of a choice or chunk."""

    @abstractmethod
    def payloads(self, chunk: AnswerChunk, head: AnswerHead) -> list[str]:
        """Returns the JSON payload of each event that a chunk needs; none if it adds no text."""

    @abstractmethod
    def complete_payload(self, choice: CompleteChoice, head: AnswerHead) -> dict[str, Any]:
        """Returns the payload of a complete choice."""


def json_text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
