"""Changes logits before sampling: penalties, bias, forbidden ends and grammars.

Each is a `LogitsProcessor`, which itself says which requests use it; rows that use none cost next
to nothing. Logits are on the device and changed in place, without waiting for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mi_runtime.device.transfer import columns_on_device, on_device, send, to_index
from mi_runtime.scheduling.grammar import GrammarState
from mi_runtime.scheduling.sequence import Sequence

SLICE = 128  # rows penalized at once, as each needs several tensors of vocabulary size
EIGHT_TIMES = 0x0101_0101_0101_0101  # a byte times this is that byte in all eight bytes
ONE_BIT_EACH = 0x8040_2010_0804_0201 - 2**64  # bit n of byte n, as a signed word

Rows = Mapping[int, Sequence]
"""Rows of the logits, and the sequence of each."""


class LogitsProcessor(ABC):
    """One kind of change to logits. `LogitsProcessors` lists all of them."""

    @abstractmethod
    def is_used_by(self, sequence: Sequence) -> bool:
        """Whether it may change the logits of any token of the sequence, by its request."""

    def is_due(self, sequence: Sequence) -> bool:
        """Whether it changes the logits of the sequence's next token."""
        return self.is_used_by(sequence)

    @abstractmethod
    def apply(self, logits: Tensor, rows: Rows) -> None:
        """Changes these rows of `logits` `[any, vocabulary]` in place."""


class LogitsProcessors:
    """All processors, in the order in which they are applied."""

    def __init__(self) -> None:
        self._all = (Penalties(), LogitBias(), ForbiddenTokens(), GrammarMasks())

    def due(self, sequences: tuple[Sequence, ...]) -> list[tuple[LogitsProcessor, Rows]]:
        """Returns the processors that are due, and the rows that each changes.

        `sequences` has one sequence per row of the logits.
        """
        users = [
            (row, one)
            for row, one in enumerate(sequences)
            if one.uses_logits_processors is not False and self._uses_any(one)
        ]
        if not users:
            return []
        due = [(each, {row: one for row, one in users if each.is_due(one)}) for each in self._all]
        return [(processor, rows) for processor, rows in due if rows]

    def _uses_any(self, sequence: Sequence) -> bool:
        """Whether any processor may ever change the sequence's logits; remembers the result."""
        if sequence.uses_logits_processors is None:
            sequence.uses_logits_processors = any(each.is_used_by(sequence) for each in self._all)
        return sequence.uses_logits_processors


class TokenCounts:
    """How often each token occurs in a sequence, which its penalties need."""

    def __init__(self, sequence: Sequence, vocab_size: int, device: torch.device) -> None:
        prompt = on_device(sequence.tokens[: sequence.prompt_length], torch.int64, device)
        in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.in_prompt = in_prompt.index_fill_(0, prompt, True)
        self.in_output = torch.zeros(vocab_size, device=device)  # fp32 counts
        self.counted = sequence.prompt_length  # tokens of the sequence counted so far

    def add(self, tokens: Tensor) -> None:
        """Counts the next tokens of the answer, `[any]` int64."""
        self.in_output.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.float32))
        self.counted += len(tokens)


class Penalties(LogitsProcessor):
    """Repetition, presence and frequency penalties. Keeps the token counts that they need."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()

    def is_used_by(self, sequence: Sequence) -> bool:
        params = sequence.request.sampling
        return (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )

    def apply(self, logits: Tensor, rows: Rows) -> None:
        penalized = [*rows.items()]
        for first in range(0, len(penalized), SLICE):
            self._penalize(logits, dict(penalized[first : first + SLICE]))

    def _penalize(self, logits: Tensor, penalized: dict[int, Sequence]) -> None:
        counts = self._counts_of(list(penalized.values()), logits)
        in_output = torch.stack([count.in_output for count in counts])
        seen = torch.stack([count.in_prompt for count in counts]) | (in_output > 0)
        params = {row: one.request.sampling for row, one in penalized.items()}
        rows, repetition, presence, frequency = columns_on_device(
            [
                (row, one.repetition_penalty, one.presence_penalty, one.frequency_penalty)
                for row, one in params.items()
            ],
            logits.device,
        )
        index = to_index(rows)
        mine = logits.index_select(0, index)
        repeated = torch.where(mine > 0, mine / repetition, mine * repetition)
        mine = torch.where(seen, repeated, mine)
        mine = mine - frequency * in_output - presence * (in_output > 0)
        logits.index_copy_(0, index, mine)

    def _counts_of(self, sequences: list[Sequence], logits: Tensor) -> list[TokenCounts]:
        """Returns the token counts of these sequences, brought up to date in one copy."""
        for one in sequences:
            if one not in self._counts:
                self._counts[one] = TokenCounts(one, logits.shape[1], logits.device)
        counts = [self._counts[one] for one in sequences]
        new = [one.tokens[count.counted :] for one, count in zip(sequences, counts, strict=True)]
        together = [token for tokens in new for token in tokens]
        sent = on_device(together, torch.int64, logits.device)
        for count, tokens in zip(counts, torch.split(sent, [*map(len, new)]), strict=True):
            count.add(tokens)
        return counts


class LogitBias(LogitsProcessor):
    """Adds a request's biases to the logits of tokens."""

    def is_used_by(self, sequence: Sequence) -> bool:
        return bool(sequence.request.sampling.logit_bias)

    def apply(self, logits: Tensor, rows: Rows) -> None:
        entries = [
            (row, token, bias)
            for row, sequence in rows.items()
            for token, bias in sequence.request.sampling.logit_bias
        ]
        at, tokens, biases = columns_on_device(entries, logits.device)
        logits.index_put_((to_index(at), to_index(tokens)), biases.squeeze(1), accumulate=True)


class ForbiddenTokens(LogitsProcessor):
    """Forbids the tokens that would end an answer which may not end yet."""

    def is_used_by(self, sequence: Sequence) -> bool:
        return sequence.may_forbid_tokens

    def is_due(self, sequence: Sequence) -> bool:
        return bool(sequence.forbidden_token_ids)

    def apply(self, logits: Tensor, rows: Rows) -> None:
        entries = [
            (row, token)
            for row, sequence in rows.items()
            for token in sequence.forbidden_token_ids
            if 0 <= token < logits.shape[1]  # a config may name an end token beyond the vocabulary
        ]
        if entries:
            at, tokens = on_device(entries, torch.int64, logits.device).unbind(1)
            logits.index_put_((at, tokens), logits.new_full((), -torch.inf))


class GrammarMasks(LogitsProcessor):
    """Masks the tokens that a sequence's grammar does not allow.

    The tag that opens a think block is allowed only if it is the most probable of all tokens:
    among the few that a grammar allows, even an unlikely tag would win.
    """

    def is_used_by(self, sequence: Sequence) -> bool:
        return sequence.grammar is not None

    def is_due(self, sequence: Sequence) -> bool:
        return sequence.constrained_by is not None

    def apply(self, logits: Tensor, rows: Rows) -> None:
        states = {row: state for row, one in rows.items() if (state := one.constrained_by)}
        masks = [_mask(state) for state in states.values()]
        forbidden = _forbidden(masks, logits)
        opens = [
            (at, row, state.extra_token)
            for at, (row, state) in enumerate(states.items())
            if state.may_open_block
            and state.extra_token is not None
            and not _allows(masks[at], state.extra_token)
        ]
        if opens:
            at, of_rows, tags = on_device(opens, torch.int64, logits.device).unbind(1)
            best = logits.index_select(0, of_rows).argmax(1)
            forbidden.index_put_((at, tags), best != tags)
        if len(states) == len(logits):
            logits.masked_fill_(forbidden, -torch.inf)
        else:
            index = on_device([*states], torch.int64, logits.device)
            left = logits.index_select(0, index).masked_fill_(forbidden, -torch.inf)
            logits.index_copy_(0, index, left)


def _mask(state: GrammarState) -> bytes:
    """Returns the grammar's mask, with the extra token unless that would open a block."""
    mask, extra_token = state.mask(), state.extra_token
    if extra_token is None or state.may_open_block:
        return mask
    longer = bytearray(mask.ljust(extra_token // 8 + 1, b"\0"))
    longer[extra_token // 8] |= 1 << extra_token % 8
    return bytes(longer)


def _allows(mask: bytes, token: int) -> bool:
    return len(mask) > token // 8 and bool(mask[token // 8] >> token % 8 & 1)


def _forbidden(masks: list[bytes], like: Tensor) -> Tensor:
    """Expands bit masks to bool `[rows, vocabulary]`, true for forbidden tokens.

    Tokens beyond the end of a mask are forbidden. Each byte of a mask is repeated to the eight
    bytes of a word, and one bit of each is kept.
    """
    width = -(-like.shape[1] // 8)  # bytes of a row
    packed = b"".join(mask[:width].ljust(width, b"\0") for mask in masks)
    octets = send(torch.frombuffer(bytearray(packed), dtype=torch.uint8), like.device).long()
    bits = (octets * EIGHT_TIMES) & ONE_BIT_EACH
    return bits.view(torch.uint8).view(len(masks), -1)[:, : like.shape[1]].eq(0)
