"""How think blocks are bounded: from the operator's settings to the engine's policy of a request.

A cap closes the block by force: the closing sequence is written, and the answer follows. In the
soft window before the cap the block is closed where a sentence or a line ends.
"""

from dataclasses import dataclass
from typing import Final

from mi_runtime.request import ThinkPolicy
from mi_runtime.scheduling.thinking import ThinkingState
from server.config import ConfigError
from server.text.reasoning_parser import THINK_CLOSE, Splitter, TextSplitter, TokenSplitter
from server.text.vocabulary import Vocabulary

SOFT_SHARE: Final = 10  # the soft window is one part in so many of the cap …
LONGEST_SOFT_WINDOW: Final = 64  # … and no more tokens than this, unless the operator says


@dataclass(frozen=True, slots=True)
class ThinkBlocks:
    """The server's rules, in token ids. None of it applies where the tags are no tokens."""

    vocabulary: Vocabulary
    closing: tuple[int, ...]
    soft_window: int | None  # tokens; None: a share of the cap

    @classmethod
    def of(cls, vocabulary: Vocabulary, *, closing: str, soft_window: int | None) -> "ThinkBlocks":
        """Raises `ConfigError` where the closing sequence would not close a block once."""
        ids = tuple(vocabulary.encode(closing))
        tags = [token_id for token_id in ids if token_id in vocabulary.tags]
        if vocabulary.has_think_tags and tags != [vocabulary.think_close_id]:
            raise ConfigError(
                f"think_closing: {closing!r} must hold the closing tag {THINK_CLOSE} once, and no "
                "other tag"
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
        """What the engine needs to follow the block; None if the tags are not tokens.

        `tools`: the model may call some, so that the tag of a call means a call. `constrained`: a
        grammar waits behind the block, which must therefore be closed; what the closing sequence
        writes of the answer itself would be against it.
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
        """Splits an answer's text where the engine sees the block begin and end."""
        policy = self.policy(opened_by_prompt=opened_by_prompt, cap=None, tools=tools)
        if policy is None:
            closing = (THINK_CLOSE,) if tools else self.vocabulary.closing_tags
            return TextSplitter(opened=opened_by_prompt, closing=closing)
        thinking = ThinkingState(policy, self.vocabulary.marks)
        return TokenSplitter(thinking, self.vocabulary.tags)

    @property
    def _bare_closing(self) -> tuple[int, ...]:
        """Without text behind the tag; line breaks there are no text."""
        assert self.vocabulary.think_close_id is not None
        end = self.closing.index(self.vocabulary.think_close_id) + 1
        behind = self.vocabulary.tokenizer.decode(list(self.closing[end:]))
        return self.closing[:end] if behind.strip("\n") else self.closing

    def _soft_window(self, cap: int) -> int:
        if self.soft_window is not None:
            return min(self.soft_window, cap)
        return min(cap // SOFT_SHARE, LONGEST_SOFT_WINDOW)
