"""A prompt that is repeated at the beginning of its answer, with its log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mi_runtime.request import TokenLogprobs
from server.answer.logprobs import WriteLogprobs, row_without_logprobs
from server.text.vocabulary import IncrementalDetokenizer, Vocabulary


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as text, and where the text of each of its tokens begins."""

    text: str
    token_ids: Sequence[int]
    offsets: Sequence[int]  # characters

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int], vocabulary: Vocabulary) -> "Echo":
        """Decodes token ids, including special ones."""
        stream, text, offsets = IncrementalDetokenizer(vocabulary, hide_special=False), "", []
        for token_id in token_ids:
            offsets.append(len(text))
            text += stream.feed(token_id)
        return cls(text + stream.finish(), token_ids, offsets)

    def logprobs(
        self, scores: Sequence[TokenLogprobs], write: WriteLogprobs, vocabulary: Vocabulary
    ) -> list[dict[str, Any]]:
        """Returns an entry for each token. `scores` has one item for each token but the first."""
        first = row_without_logprobs(vocabulary.token_text(self.token_ids[0]), 0)
        others = zip(self.token_ids[1:], scores, self.offsets[1:], strict=True)
        return [first, *(write(*each) for each in others)]
