"""What a step computes of one sequence, and what it gives back."""

from dataclasses import dataclass, field

from mi_runtime.request import Dial, TokenLogprobs
from mi_runtime.scheduling.sequence import Sequence

Sampled = tuple[int, TokenLogprobs | None]  # token id, and its logprobs where asked for


@dataclass(slots=True)  # nothing changes it; frozen, it would take five times as long to make
class Chunk:
    """Tokens [start, start + length) of a sequence: one step computes their KV."""

    sequence: Sequence
    start: int
    length: int
    samples: bool = field(init=False)  # it reaches the last token, so that the next one is drawn
    scored: range = field(init=False)  # positions whose logits score the prompt token behind them
    dial: Dial | None = field(init=False)  # of all its tokens; None where the answer's begins in it

    def __post_init__(self) -> None:
        """What is to be done with it, as things stand when it is scheduled."""
        sequence, end = self.sequence, self.start + self.length
        scored = sequence.unscored
        if scored:
            scored = range(max(self.start, scored.start), min(end, scored.stop))
        self.samples = end >= len(sequence.tokens)
        self.scored = scored
        self.dial = sequence.dial_over(self.start, end)
