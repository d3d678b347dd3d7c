"""Turns the operator's settings for think blocks into the `ThinkPolicy` of a request.

At its cap a block is closed by force: the engine writes the closing sequence, and the answer
follows. In the soft window before the cap, a block is closed at the end of a sentence or line.
"""

from dataclasses import dataclass
from typing import Final

from mi_runtime.request import ThinkPolicy
from server.config import ConfigError
from server.text.reasoning_parser import THINK_CLOSE, Splitter, TextSplitter, TokenSplitter
from server.text.vocabulary import Vocabulary

SOFT_SHARE: Final = 10  # the soft window is this fraction of the cap (1 / SOFT_SHARE) …
LONGEST_SOFT_WINDOW: Final = 64  # … and at most this many tokens, unless the operator sets it


@dataclass(frozen=True, slots=True)
class ThinkBlocks:
    """The server's rules in token ids. They apply only if both tags are single tokens."""

    vocabulary: Vocabulary
    closing: tuple[int, ...]
    soft_window: int | None  # tokens; None: a share of the cap

    @classmethod
    def of(cls, vocabulary: Vocabulary, *, closing: str, soft_window: int | None) -> "ThinkBlocks":
        """Encodes the closing sequence. Raises `ConfigError` unless it has the closing tag once."""
        ids = tuple(vocabulary.encode(closing))
        tags = [token_id for token_id in ids if token_id in vocabulary.tags]
        if vocabulary.has_think_tags and tags != [vocabulary.think_close_id]:
            raise ConfigError(
                f"think_closing: {closing!r} must contain the closing tag {THINK_CLOSE} once, and "
                "no other tag"
            )
        return cls(vocabulary, ids, soft_window)

    def policy(
        self,
        *,
        opened_by_prompt: bool,
        cap: int | None,
        tools: bool = False,
        constrained: bool = False,
    ) -> ThinkPolicy | None:
        """Returns what the engine needs to track the block, or None if the tags are not tokens.

        With `tools` the model may call tools, so the tag of a call does not close the block. With
        `constrained` a grammar applies after the block: the block must be closed, and the closing
        sequence must not write any of the answer, which would violate the grammar.
        """
        open_id, close_id = self.vocabulary.think_open_id, self.vocabulary.think_close_id
        if open_id is None or close_id is None:
            return None
        return ThinkPolicy(
            open_id,
            close_id,
            opened_by_prompt=opened_by_prompt,
            cap=cap,
            closing=self._bare_closing if constrained else self.closing,
            soft_window=0 if cap is None else self._soft_window(cap),
            close_aliases=frozenset() if tools else self.vocabulary.close_aliases,
            forbid_eos=constrained,
        )

    def splitter(self, *, opened_by_prompt: bool, tools: bool = False) -> Splitter:
        """Returns a splitter of an answer's text that agrees with the engine about the block."""
        if self.vocabulary.has_think_tags:
            return TokenSplitter(opened=opened_by_prompt, tags=self.vocabulary.tags)
        closing = (THINK_CLOSE,) if tools else self.vocabulary.closing_tags
        return TextSplitter(opened=opened_by_prompt, closing=closing)

    @property
    def _bare_closing(self) -> tuple[int, ...]:
        """The closing sequence, cut after its tag unless only line breaks follow."""
        assert self.vocabulary.think_close_id is not None
        end = self.closing.index(self.vocabulary.think_close_id) + 1
        tail = self.vocabulary.tokenizer.decode(list(self.closing[end:]))
        return self.closing[:end] if tail.strip("\n") else self.closing

    def _soft_window(self, cap: int) -> int:
        if self.soft_window is not None:
            return min(self.soft_window, cap)
        return min(cap // SOFT_SHARE, LONGEST_SOFT_WINDOW)
