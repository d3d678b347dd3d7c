"""Writes answers of `/v1/completions`: text, and log-probabilities as columns."""

from json.encoder import encode_basestring_ascii as quoted
from typing import Any, ClassVar, Final

from server.answer.answer import AnswerHead
from server.answer.answer_format import AnswerFormat, CompleteChoice
from server.answer.choice import AnswerChunk
from server.answer.logprobs import WriteLogprobs, columns, completions_logprobs
from server.text.vocabulary import Vocabulary


class CompletionsFormat(AnswerFormat):
    """The format of `/v1/completions`."""

    id_prefix: ClassVar = "cmpl"
    object_type: ClassVar = "text_completion"
    chunk_type: ClassVar = "text_completion"
    first_payload: ClassVar = '"text":""'
    empty_payload: ClassVar = '"text":""'

    def logprobs_writer(self, vocabulary: Vocabulary) -> WriteLogprobs:
        return completions_logprobs(vocabulary)

    def logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        return columns(entries)

    def payloads(self, chunk: AnswerChunk, head: AnswerHead) -> list[str]:
        return [f'"text":{quoted(chunk.content)}'] if chunk.content else []

    def complete_payload(self, choice: CompleteChoice, head: AnswerHead) -> dict[str, Any]:
        return {"text": "".join(choice.content)}


COMPLETIONS: Final = CompletionsFormat()
