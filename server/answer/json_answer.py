"""Writes an answer that is not streamed as one JSON object."""

from typing import Any

from server.answer.answer import Answer, AnswerHead
from server.answer.answer_format import AnswerFormat, CompleteChoice


async def json_answer(answer: Answer, answer_format: AnswerFormat) -> dict[str, Any]:
    """Waits for the end of the answer. Raises what `Answer.chunks` raises."""
    head = answer.head
    choices = await _gather(answer)
    return {
        **head.fields(answer_format.object_type),
        "choices": [_choice(index, it, head, answer_format) for index, it in enumerate(choices)],
        "usage": answer.usage,
        "routing": head.routing_body(forced_close=answer.forced_close),
    }


async def _gather(answer: Answer) -> list[CompleteChoice]:
    choices = [CompleteChoice() for _ in answer.choices]
    async for chunks in answer.chunks():
        for chunk in chunks:
            choices[chunk.index].add(chunk)
    return choices


def _choice(
    index: int, choice: CompleteChoice, head: AnswerHead, answer_format: AnswerFormat
) -> dict[str, Any]:
    return {
        "index": index,
        **answer_format.complete_payload(choice, head),
        "logprobs": answer_format.logprobs(choice.logprobs) if head.logprobs else None,
        "finish_reason": choice.finish_reason,
        **head.decision.of_choice(index),
    }
