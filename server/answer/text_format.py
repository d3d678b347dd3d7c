"""How answers of `/v1/completions` are written: text, and log-probabilities as columns."""

from json.encoder import encode_basestring_ascii as quoted
from typing import Any, ClassVar, Final

from server.answer.answer import Answer, AnswerHead
from server.answer.chat_format import ChunkWriter, Form, Whole, gathered, json_text
from server.answer.choice import Chunk
from server.answer.logprobs import columns, text_logprobs


class TextChunkWriter(ChunkWriter):
    """Writes the chunks of one answer."""

    object: ClassVar[str] = "text_completion"

    def first(self, choices: int) -> bytes:
        """An empty piece of each choice, and the λ it runs at."""
        return "".join(
            f'{self._before}{index},"text":"","logprobs":null,"finish_reason":null'
            f"{self._of_choice(index)}}}]{self._routing[False]}{self._end}"
            for index in range(choices)
        ).encode()

    def _chunk(self, chunk: Chunk) -> str:
        opening = f'{self._before}{chunk.index},"text":{quoted(chunk.content)}'
        if chunk.finish_reason is None and not chunk.logprobs:
            return f"{opening}{self._plain_end}{self._end}" if chunk.content else ""
        logprobs = json_text(columns(chunk.logprobs)) if self._head.logprobs else "null"
        own, routing = "", ""
        if chunk.finish_reason is not None:
            own, routing = self._of_choice(chunk.index), self._routing[False]
        return (
            f'{opening},"logprobs":{logprobs},"finish_reason":{json_text(chunk.finish_reason)}'
            f"{own}}}]{routing}{self._end}"
        )


async def text_completion(answer: Answer) -> dict[str, Any]:
    """The answer as one object. Raises what `Answer.chunks` raises."""
    head = answer.head
    wholes = await gathered(answer)
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
        "choices": [_choice(index, whole, head) for index, whole in enumerate(wholes)],
        "usage": answer.usage,
        "routing": head.routing.body,
    }


def _choice(index: int, whole: Whole, head: AnswerHead) -> dict[str, Any]:
    return {
        "index": index,
        "text": "".join(whole.content),
        "logprobs": columns(whole.logprobs) if head.logprobs else None,
        "finish_reason": whole.finish_reason,
        **head.routing.of_choice(index),
    }


TEXT: Final = Form("cmpl", TextChunkWriter, text_completion, text_logprobs)
