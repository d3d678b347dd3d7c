"""A sequence: the tokens of one request, and how much of its KV is computed.

The scheduler changes it and the runner reads it. It knows nothing of other sequences.
"""

import random
import sys
import time
from array import array
from collections.abc import MutableSequence
from enum import Enum, auto
from functools import lru_cache
from typing import Final

from mi_runtime.config import TokenMarks
from mi_runtime.request import Dial, EngineRequest, Phase, TokenLogprobs
from mi_runtime.scheduling.grammar import Grammars, GrammarState
from mi_runtime.scheduling.thinking import ThinkingState

NO_TOKENS: Final = frozenset[int]()
NOTHING: Final = range(0)


class SequenceStatus(Enum):
    WAITING = auto()  # holds no blocks: new, or preempted
    RUNNING = auto()
    ENDED = auto()


class Sequence:
    """The prompt and answer of one request, its KV blocks, and its random number generator.

    `rng` gives exactly one uniform number per sampled token, so that a token depends neither on the
    batch nor on preemption.
    """

    __slots__ = (
        "__weakref__",
        "answer_dial",
        "arrival",
        "block_keys",
        "block_table",
        "cached_tokens",
        "computed",
        "dial",
        "ending_token_ids",
        "first_scheduled",
        "grammar",
        "in_flight",
        "max_length",
        "prompt_length",
        "prompt_logprobs",
        "queue_seconds",
        "rank",
        "request",
        "rng",
        "status",
        "switch_at",
        "thinking",
        "tokens",
        "uses_logits_processors",
    )

    def __init__(
        self,
        request: EngineRequest,
        marks: TokenMarks | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.request = request
        self.dial = _shared(request.dial)
        self.answer_dial = None if request.answer_dial is None else _shared(request.answer_dial)
        self.tokens = list(request.prompt)  # prompt and answer
        self.prompt_length = len(request.prompt)
        self.max_length = self.prompt_length + _or_unlimited(request.sampling.max_tokens)
        self.computed = 0  # tokens whose KV is in blocks, counting those of the step in flight
        self.in_flight = 0  # steps that compute it and whose results have not arrived
        self.block_table: MutableSequence[int] = array("i")
        self.block_keys: list[bytes] = []  # root, then one per full block; made when needed
        self.cached_tokens = 0  # of the prompt, at first admission
        self.prompt_logprobs: list[TokenLogprobs] = []  # of prompt tokens 1, 2, …, as far as known
        self.status = SequenceStatus.WAITING
        self.rank = (request.priority, 0)  # lower runs first; the scheduler sets the arrival number
        self.rng = random.Random(request.sampling.seed)  # None: seeded by the operating system
        self.ending_token_ids = request.sampling.ending_token_ids
        self.uses_logits_processors: bool | None = None  # the sampler finds out at the first token
        self.switch_at: int | None = None  # first position under the answer's dial
        self.thinking = None if request.think is None else ThinkingState(request.think, marks)
        self.grammar: GrammarState | None = None
        if request.grammar is not None:
            assert grammars is not None
            self.grammar = grammars.state(request.grammar, self.thinking)
        self.arrival = time.monotonic()  # seconds
        self.first_scheduled: float | None = None  # seconds, by the same clock
        self.queue_seconds = 0.0  # from arrival to its first step; 0 before that

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def ended(self) -> bool:
        return self.status is SequenceStatus.ENDED

    @property
    def remaining(self) -> int:
        """The number of known tokens whose KV is not computed: 1 in decode, more in prefill.

        It is 0 while the next token is being sampled.
        """
        return len(self.tokens) - self.computed

    @property
    def awaits_token(self) -> bool:
        """Whether the next token to compute is not known yet: a step in flight samples it."""
        return self.remaining <= 0

    @property
    def may_switch(self) -> bool:
        """Whether the next token may be the first one under the answer's dial."""
        if self.answer_dial is None or self.thinking is None:
            return False
        return self.thinking.phase is Phase.INSIDE

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def forbids_ending(self) -> bool:
        """Whether the next token may not be one of `ending_token_ids`."""
        least = self.request.sampling.min_tokens
        if least and self.output_length < least:
            return True
        return self.thinking is not None and self.thinking.forbids_eos

    @property
    def forbidden_token_ids(self) -> frozenset[int]:
        """The token ids that the next token must not be."""
        params = self.request.sampling
        forbidden = self.ending_token_ids if self.forbids_ending else NO_TOKENS
        if self.grammar is not None and params.ignore_eos:  # a complete grammar allows the end
            forbidden |= params.eos_token_ids
        return forbidden

    @property
    def may_forbid_tokens(self) -> bool:
        """Whether `forbidden_token_ids` may have any for some token of the answer."""
        params, think = self.request.sampling, self.request.think
        return (
            params.min_tokens > 0
            or (think is not None and think.forbid_eos)
            or (self.grammar is not None and params.ignore_eos)
        )

    @property
    def constrained_by(self) -> GrammarState | None:
        """The grammar if it decides which tokens may come next, else None."""
        grammar = self.grammar
        return grammar if grammar is not None and grammar.constrains else None

    @property
    def forced_token(self) -> int | None:
        """The next token if the engine forces it, else None."""
        return None if self.thinking is None else self.thinking.forced_token

    @property
    def unscored(self) -> range:
        """The prompt positions whose logits are still needed, each to score the token after it."""
        if self.request.sampling.prompt_logprobs is None:
            return NOTHING
        return range(len(self.prompt_logprobs), self.prompt_length - 1)

    @property
    def forced_close(self) -> bool:
        return self.thinking is not None and self.thinking.forced_close

    def dial_at(self, position: int) -> Dial:
        """Returns the dial under which the token at `position` is computed."""
        if self.switch_at is None or position < self.switch_at:
            return self.dial
        assert self.answer_dial is not None
        return self.answer_dial

    def dial_over(self, start: int, end: int) -> Dial | None:
        """Returns the dial of the tokens [start, end), or None if they have two."""
        switch = self.switch_at
        if switch is None or end <= switch:
            return self.dial
        return self.answer_dial if start >= switch or self.dial == self.answer_dial else None

    def append(self, token_id: int) -> None:
        """Appends a sampled token. The one that closes the think block starts the answer."""
        self.tokens.append(token_id)
        if self.grammar is not None:
            self.grammar.observe(token_id)
        if (
            self.thinking is not None
            and self.thinking.observe(token_id)
            and self.answer_dial is not None
        ):
            self.switch_at = len(self.tokens) - 1


@lru_cache(maxsize=1024)
def _shared(dial: Dial) -> Dial:
    """Returns one object for all equal dials, so that comparing them is by identity."""
    return dial


def _or_unlimited(max_tokens: int | None) -> int:
    return sys.maxsize if max_tokens is None else max_tokens
