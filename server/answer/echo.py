"""A prompt that stands at the beginning of its answer, with its log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mi_runtime.request import TokenEvent, TokenLogprobs
from server.answer.choice import Choice, Chunk
from server.answer.logprobs import WriteLogprobs, unscored
from server.text.vocabulary import IncrementalDetokenizer, Vocabulary


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as text, and where the text of each of its tokens begins."""

    text: str
    token_ids: Sequence[int]
    offsets: Sequence[int]  # characters

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int], vocabulary: Vocabulary) -> "Echo":
        """The text of token ids, special ones included."""
        stream, text, offsets = IncrementalDetokenizer(vocabulary, hide_special=False), "", []
        for token_id in token_ids:
            offsets.append(len(text))
            text += stream.feed(token_id)
        return cls(text + stream.finish(), token_ids, offsets)

    def logprobs(
        self, scores: Sequence[TokenLogprobs], write: WriteLogprobs, vocabulary: Vocabulary
    ) -> list[dict[str, Any]]:
        """`scores`: of each token but the first."""
        first = unscored(vocabulary.token_text(self.token_ids[0]), 0)
        behind = zip(self.token_ids[1:], scores, self.offsets[1:], strict=True)
        return [first, *(write(*each) for each in behind)]


class EchoingChoice(Choice):
    """A choice whose first chunk begins with the prompt."""

    def __init__(
        self,
        index: int,
        *,
        echo: Echo,
        vocabulary: Vocabulary,
        logprobs: WriteLogprobs | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            index,
            vocabulary=vocabulary,
            logprobs=logprobs,
            text_before=len(echo.text),
            **others,
        )
        self._echo: Echo | None = echo
        self._vocabulary = vocabulary

    def take(self, at: float, event: TokenEvent) -> Chunk | None:
        chunk = super().take(at, event)
        if self._echo is None:
            return chunk
        echo, self._echo = self._echo, None
        chunk = chunk or Chunk(self.index)
        chunk.content = echo.text + chunk.content
        if self._write_logprobs is not None and event.prompt_logprobs is not None:
            scores = echo.logprobs(event.prompt_logprobs, self._write_logprobs, self._vocabulary)
            chunk.logprobs = scores + chunk.logprobs
        return chunk
