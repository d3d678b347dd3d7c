"""Writes an answer as a stream of server-sent events.

The JSON of a chunk is put together from parts that are made once for each answer, because chunks
are written thousands of times a second. Text is written in ASCII with escapes: some clients split
lines at U+2028 and similar characters, which JSON allows unescaped.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from server.answer.answer import Answer, AnswerHead
from server.answer.answer_format import AnswerFormat, json_text
from server.answer.choice import AnswerChunk
from server.engine.generation import ClientLeft
from server.wire.errors import ApiError, RequestFailed

logger = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"


async def events(
    answer: Answer, answer_format: AnswerFormat, *, keep_alive: float
) -> AsyncGenerator[bytes, None]:
    """Yields the events of an answer, and a comment if none was due for `keep_alive` seconds.

    The status 200 has been sent by now, so whatever fails from here on is reported as an event.
    """
    writer = ChunkWriter(answer.head, answer_format)
    batches = answer.chunks(wake_after=keep_alive)
    try:
        yield writer.first(len(answer.choices))
        async for chunks in batches:
            written = writer.write(chunks) if chunks else KEEP_ALIVE
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
        await batches.aclose()


class ChunkWriter:
    """Writes the chunks of one answer."""

    def __init__(self, head: AnswerHead, answer_format: AnswerFormat) -> None:
        self._head = head
        self._format = answer_format
        self._opening = json_text(head.fields(answer_format.chunk_type))[:-1]
        self._before = f'data: {self._opening},"choices":[{{"index":'
        self._end = (',"usage":null' if head.include_usage else "") + "}\n\n"
        self._plain_end = f',"logprobs":null,"finish_reason":null}}]{self._end}'
        self._routing = {
            forced: f',"routing":{json_text(head.routing_body(forced_close=forced))}'
            for forced in (False, True)
        }  # by whether the engine closed a think block

    def first(self, choices: int) -> bytes:
        """Writes the first chunk of each choice, which has no text but the λ it runs at."""
        middle = f'{self._format.first_payload},"logprobs":null,"finish_reason":null'
        return "".join(
            f"{self._before}{index},{middle}{self._of_choice(index)}}}]"
            f"{self._routing[False]}{self._end}"
            for index in range(choices)
        ).encode()

    def write(self, chunks: Sequence[AnswerChunk]) -> bytes:
        """Writes several chunks as one piece, so that those that arrive together leave together."""
        return "".join([self._chunk(chunk) for chunk in chunks]).encode()

    def usage(self, usage: dict[str, Any], *, forced_close: bool) -> bytes:
        routing = self._routing[forced_close]
        text = f'data: {self._opening},"choices":[],"usage":{json_text(usage)}{routing}}}'
        return f"{text}\n\n".encode()

    def _chunk(self, chunk: AnswerChunk) -> str:
        payloads = self._format.payloads(chunk, self._head)
        if not payloads:
            if not (chunk.finish_reason or chunk.logprobs):
                return ""
            payloads = [self._format.empty_payload]
        *others, last = payloads
        plain = [f"{self._before}{chunk.index},{other}{self._plain_end}" for other in others]
        return "".join(plain) + self._last_event(chunk, last)

    def _last_event(self, chunk: AnswerChunk, payload: str) -> str:
        """Writes the last event of a chunk, which has its logprobs and its finish reason."""
        if chunk.finish_reason is None and not chunk.logprobs:
            return f"{self._before}{chunk.index},{payload}{self._plain_end}"
        logprobs = "null"
        if self._head.logprobs:
            logprobs = json_text(self._format.logprobs(chunk.logprobs))
        lambdas, routing = "", ""
        if chunk.finish_reason is not None:
            lambdas, routing = self._of_choice(chunk.index), self._routing[chunk.forced_close]
        return (
            f'{self._before}{chunk.index},{payload},"logprobs":{logprobs},'
            f'"finish_reason":{json_text(chunk.finish_reason)}{lambdas}}}]{routing}{self._end}'
        )

    def _of_choice(self, index: int) -> str:
        """Returns the last fields of a choice, in its first and its last chunk."""
        fields = self._head.decision.of_choice(index)
        return f",{json_text(fields)[1:-1]}" if fields else ""


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json_text(body)}\n\n".encode()
