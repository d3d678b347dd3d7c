"""Writes answers of `/v1/chat/completions`: messages with reasoning and tool calls."""

from json.encoder import encode_basestring_ascii as quoted
from typing import Any, ClassVar, Final

from server.answer.answer import AnswerHead
from server.answer.answer_format import AnswerFormat, CompleteChoice, json_text
from server.answer.choice import AnswerChunk
from server.answer.logprobs import WriteLogprobs, chat_logprobs
from server.text.tool_parser import join_deltas
from server.text.vocabulary import Vocabulary


class ChatFormat(AnswerFormat):
    """The format of `/v1/chat/completions`."""

    id_prefix: ClassVar = "chatcmpl"
    object_type: ClassVar = "chat.completion"
    chunk_type: ClassVar = "chat.completion.chunk"
    first_payload: ClassVar = '"delta":{"role":"assistant","content":""}'
    empty_payload: ClassVar = '"delta":{}'

    def logprobs_writer(self, vocabulary: Vocabulary) -> WriteLogprobs:
        return chat_logprobs(vocabulary)

    def logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {"content": entries}

    def payloads(self, chunk: AnswerChunk, head: AnswerHead) -> list[str]:
        """Returns several payloads if a token closed the block and began content or a call."""
        payloads = []
        if chunk.reasoning and head.include_reasoning:
            text = quoted(chunk.reasoning)
            payloads.append(f'"delta":{{"reasoning_content":{text},"reasoning":{text}}}')
        if chunk.content:
            payloads.append(f'"delta":{{"content":{quoted(chunk.content)}}}')
        for call in chunk.calls:
            payloads.append(f'"delta":{json_text({"tool_calls": [call.on_wire]})}')
        return payloads

    def complete_payload(self, choice: CompleteChoice, head: AnswerHead) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.content)}
        reasoning = "".join(choice.reasoning)
        if reasoning and head.include_reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if choice.calls:
            message |= {
                "content": message["content"] or None,
                "tool_calls": join_deltas(choice.calls),
            }
        return {"message": message}


CHAT: Final = ChatFormat()
