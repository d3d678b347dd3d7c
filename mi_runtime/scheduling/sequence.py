"""One request on its way through the engine: its tokens, and how far its KV is computed.

Knows nothing of other sequences. The scheduler moves it, the runner reads it.
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


class Status(Enum):
    WAITING = auto()  # holds no blocks: new, or preempted
    RUNNING = auto()
    ENDED = auto()


class Sequence:
    """Prompt and answer of one request, its blocks, and its own source of randomness.

    `rng` gives exactly one uniform number a sampled token, so that what is drawn depends neither
    on the batch nor on preemption.
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
        "has_logits_processors",
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
        self.max_length = self.prompt_length + _or_endless(request.sampling.max_tokens)
        self.computed = 0  # tokens whose KV is in blocks, or will be before what comes next
        self.in_flight = 0  # steps that compute it, and whose results are not there yet
        self.block_table: MutableSequence[int] = array("i")
        self.block_keys: list[bytes] = []  # root, then one of each full block; made when needed
        self.cached_tokens = 0  # of the prompt, at first admission
        self.prompt_logprobs: list[TokenLogprobs] = []  # of prompt tokens 1, 2, …; as far as known
        self.status = Status.WAITING
        self.rank = (request.priority, 0)  # the least runs first; the scheduler counts arrivals
        self.rng = random.Random(request.sampling.seed)  # None: seeded by the operating system
        self.ending_token_ids = request.sampling.ending_token_ids
        self.has_logits_processors = _has_rules(request)
        self.switch_at: int | None = None  # position from which on the answer's dial holds
        self.thinking = None if request.think is None else ThinkingState(request.think, marks)
        self.grammar: GrammarState | None = None
        if request.grammar is not None:
            assert grammars is not None
            self.grammar = grammars.state(request.grammar, self.thinking)
        self.arrival = time.monotonic()  # seconds
        self.first_scheduled: float | None = None  # seconds, of the same clock
        self.queue_seconds = 0.0  # from submission to the first step that ran it; 0 where none did

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def ended(self) -> bool:
        return self.status is Status.ENDED

    @property
    def remaining(self) -> int:
        """Known tokens whose KV is not computed: 1 when decoding, more when prefilling.

        0 while the next token is being drawn.
        """
        return len(self.tokens) - self.computed

    @property
    def awaits_token(self) -> bool:
        """Whether the next token to compute is not known: it is being drawn."""
        return self.remaining <= 0

    @property
    def may_switch(self) -> bool:
        """Whether the next token may be the first under the answer's dial."""
        if self.answer_dial is None or self.thinking is None:
            return False
        return self.thinking.phase is Phase.INSIDE

    @property
    def output(self) -> list[int]:
        """The answer so far, a copy."""
        return self.tokens[self.prompt_length :]

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
        """What the next token may not be, whatever the model says."""
        params = self.request.sampling
        forbidden = self.ending_token_ids if self.forbids_ending else NO_TOKENS
        if self.grammar is not None and params.ignore_eos:  # a grammar allows an end when complete
            forbidden |= params.eos_token_ids
        return forbidden

    @property
    def constrained_by(self) -> GrammarState | None:
        """The grammar, where the next token is the grammar's to allow."""
        grammar = self.grammar
        return grammar if grammar is not None and grammar.constrains else None

    @property
    def forced_token(self) -> int | None:
        """The next token where it is not the model's to choose."""
        return None if self.thinking is None else self.thinking.forced_token

    @property
    def unscored(self) -> range:
        """Positions whose logits are still needed: each scores the prompt token behind it."""
        if self.request.sampling.prompt_logprobs is None:
            return NOTHING
        return range(len(self.prompt_logprobs), self.prompt_length - 1)

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self.thinking is None else self.thinking.reasoning_tokens

    @property
    def forced_close(self) -> bool:
        return self.thinking is not None and self.thinking.forced_close

    def dial_at(self, position: int) -> Dial:
        """The dial under which the token at `position` is computed."""
        if self.switch_at is None or position < self.switch_at:
            return self.dial
        assert self.answer_dial is not None
        return self.answer_dial

    def dial_over(self, start: int, end: int) -> Dial | None:
        """The dial of the tokens [start, end); None where the answer's begins among them."""
        switch = self.switch_at
        if switch is None or end <= switch:
            return self.dial
        return self.answer_dial if start >= switch or self.dial == self.answer_dial else None

    def append(self, token_id: int) -> None:
        """Takes a sampled token. The one that closes the think block is the first of the answer."""
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
    """The first of equal dials: where they are one object, nobody compares them value by value."""
    return dial


def _or_endless(max_tokens: int | None) -> int:
    return sys.maxsize if max_tokens is None else max_tokens


def _has_rules(request: EngineRequest) -> bool:
    """Whether penalties, bias or forbidden ends may ever change logits."""
    return (
        request.sampling.has_penalty
        or bool(request.sampling.logit_bias)
        or request.sampling.min_tokens > 0
        or (request.think is not None and request.think.forbid_eos)
    )
