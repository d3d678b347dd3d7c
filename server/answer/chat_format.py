"""The two ways an answer is written: chunks as server-sent events, or all of it as one object.

A chunk's JSON is put together from parts that are made once per answer, because it is written
thousands of times a second. Text is written in ASCII with escapes: some clients split lines at
U+2028 and its like, which JSON allows bare.
"""

import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, ClassVar, Final

from server.answer.answer import Answer, AnswerHead
from server.answer.choice import Chunk
from server.answer.logprobs import WriteLogprobs, chat_logprobs
from server.engine.generation import ClientLeft
from server.text.tool_parser import CallDelta, join_deltas
from server.text.vocabulary import Vocabulary
from server.wire.errors import ApiError, RequestFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Form:
    """How one kind of answer is written."""

    id_prefix: str
    writer: "Callable[[AnswerHead], ChunkWriter]"  # of a stream
    whole: Callable[[Answer], Awaitable[dict[str, Any]]]  # as one object
    logprobs: Callable[[Vocabulary], WriteLogprobs]


DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"
FORCED_CLOSE: Final = {"forced_close": True}  # of the routing, where the engine closed a block

# --- Server-sent events --------------------------------------------------------------------------


async def sse(
    answer: Answer, writer: "ChunkWriter", *, keep_alive: float
) -> AsyncGenerator[bytes, None]:
    """The answer as events; a comment where none came for `keep_alive` seconds.

    This is an edge: the 200 is sent, so whatever fails from here on is an event too.
    """
    chunks = answer.chunks(wake_after=keep_alive)
    try:
        yield writer.first(len(answer.choices))
        async for batch in chunks:
            written = writer.write(batch) if batch else KEEP_ALIVE
            if written:
                yield written
        if answer.head.include_usage:
            yield writer.usage(answer.usage, forced_close=answer.forced_close) + DONE
        else:
            yield DONE
    except ClientLeft:
        pass
    except ApiError as error:
        yield _event(error.body)
    except Exception:
        logger.exception("An answer failed in the middle of its stream")
        yield _event(RequestFailed("The server failed to complete this answer").body)
    finally:
        await chunks.aclose()


class ChunkWriter:
    """Writes the chunks of one answer."""

    object: ClassVar[str] = "chat.completion.chunk"

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        opening = {
            "id": head.id,
            "object": self.object,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.system_fingerprint,
        }
        self._opening = json_text(opening)[:-1]
        self._before = f'data: {self._opening},"choices":[{{"index":'
        self._plain_end = ',"logprobs":null,"finish_reason":null}]'
        self._end = (',"usage":null' if head.include_usage else "") + "}\n\n"
        routing = head.routing.body
        self._routing = {
            False: f',"routing":{json_text(routing)}',
            True: f',"routing":{json_text(routing | FORCED_CLOSE)}',
        }  # by whether the engine closed a think block

    def first(self, choices: int) -> bytes:
        """The role of each choice, and the λ it runs at."""
        middle = ',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return "".join(
            f"{self._before}{index}{middle}{self._of_choice(index)}}}]"
            f"{self._routing[False]}{self._end}"
            for index in range(choices)
        ).encode()

    def write(self, chunks: Sequence[Chunk]) -> bytes:
        """Several chunks as one piece, so that what came together is sent together."""
        return "".join([self._chunk(chunk) for chunk in chunks]).encode()

    def usage(self, usage: dict[str, Any], *, forced_close: bool) -> bytes:
        routing = self._routing[forced_close]
        text = f'data: {self._opening},"choices":[],"usage":{json_text(usage)}{routing}}}'
        return f"{text}\n\n".encode()

    def _of_choice(self, index: int) -> str:
        """The last fields of a choice, in its first and its last chunk."""
        fields = self._head.routing.of_choice(index)
        return f",{json_text(fields)[1:-1]}" if fields else ""

    def _chunk(self, chunk: Chunk) -> str:
        """One event; more where a token closed the block and began the content, or a call."""
        deltas = self._deltas(chunk)
        if not deltas:
            if not (chunk.finish_reason or chunk.logprobs):
                return ""
            deltas = ["{}"]
        first = [self._event(Chunk(chunk.index), delta) for delta in deltas[:-1]]
        return "".join(first) + self._event(chunk, deltas[-1])

    def _deltas(self, chunk: Chunk) -> list[str]:
        deltas = []
        if chunk.reasoning and self._head.include_reasoning:
            text = quoted(chunk.reasoning)
            deltas.append(f'{{"reasoning_content":{text},"reasoning":{text}}}')
        if chunk.content:
            deltas.append(f'{{"content":{quoted(chunk.content)}}}')
        deltas += [json_text({"tool_calls": [delta.on_wire]}) for delta in chunk.calls]
        return deltas

    def _event(self, chunk: Chunk, delta: str) -> str:
        if chunk.finish_reason is None and not chunk.logprobs:
            return f'{self._before}{chunk.index},"delta":{delta}{self._plain_end}{self._end}'
        logprobs = json_text({"content": chunk.logprobs}) if self._head.logprobs else "null"
        finish = json_text(chunk.finish_reason)
        own, routing = "", ""
        if chunk.finish_reason is not None:
            own, routing = self._of_choice(chunk.index), self._routing[chunk.forced_close]
        return (
            f'{self._before}{chunk.index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish}{own}}}]{routing}{self._end}'
        )


def json_text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json_text(body)}\n\n".encode()


# --- One object ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Whole:
    """The chunks of one choice, put together."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[CallDelta] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: Chunk) -> None:
        if chunk.repeats_reasoning:
            self.reasoning.clear()
        else:
            self.reasoning.append(chunk.reasoning)
        self.content.append(chunk.content)
        self.calls += chunk.calls
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason


async def gathered(answer: Answer) -> list[Whole]:
    """The choices of an answer, complete. Raises what `Answer.chunks` raises."""
    wholes = [Whole() for _ in answer.choices]
    async for batch in answer.chunks():
        for chunk in batch:
            wholes[chunk.index].add(chunk)
    return wholes


async def completion(answer: Answer) -> dict[str, Any]:
    """The answer as one object. Raises what `Answer.chunks` raises."""
    head = answer.head
    wholes = await gathered(answer)
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
        "choices": [_choice(index, whole, head) for index, whole in enumerate(wholes)],
        "usage": answer.usage,
        "routing": head.routing.body | (FORCED_CLOSE if answer.forced_close else {}),
    }


def _choice(index: int, whole: Whole, head: AnswerHead) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(whole.content)}
    reasoning = "".join(whole.reasoning)
    if reasoning and head.include_reasoning:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if whole.calls:
        message |= {"content": message["content"] or None, "tool_calls": join_deltas(whole.calls)}
    return {
        "index": index,
        "message": message,
        "logprobs": {"content": whole.logprobs} if head.logprobs else None,
        "finish_reason": whole.finish_reason,
        **head.routing.of_choice(index),
    }


CHAT: Final = Form("chatcmpl", ChunkWriter, completion, chat_logprobs)
