"""A chunk: the tokens of one sequence that a step computes."""

from dataclasses import dataclass, field

from mi_runtime.request import Dial, TokenLogprobs
from mi_runtime.scheduling.sequence import Sequence

Sampled = tuple[int, TokenLogprobs | None]  # token id, and its logprobs if requested


@dataclass(slots=True)  # never changed; a frozen one takes five times as long to create
class Chunk:
    """The tokens [start, start + length) of a sequence, whose KV one step computes."""

    sequence: Sequence
    start: int
    length: int
    samples: bool = field(init=False)  # it reaches the last known token: the next one is sampled
    scored: range = field(init=False)  # positions whose logits score the prompt token after each
    dial: Dial | None = field(init=False)  # of all tokens; None if the answer's dial begins in it

    def __post_init__(self) -> None:
        """Derives what the step must do from the state of the sequence when it is scheduled."""
        sequence, end = self.sequence, self.start + self.length
        scored = sequence.unscored
        if scored:
            scored = range(max(self.start, scored.start), min(end, scored.stop))
        self.samples = end >= len(sequence.tokens)
        self.scored = scored
        self.dial = sequence.dial_over(self.start, end)
