"""Finds the three stages of a curve by its think rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

THINKS_RARELY: Final = 0.1
THINKS_NEARLY_ALWAYS: Final = 0.9
RULE: Final = (
    f"stage 1: the first points, with a think rate below {THINKS_RARELY:g}; stage 3: the last "
    f"points, with a think rate of at least {THINKS_NEARLY_ALWAYS:g}; stage 2: the points between "
    "them. Without a stage 1 or a stage 3 there is no transition"
)


@dataclass(frozen=True, slots=True)
class Stages:
    """The three stages of a curve that has them."""

    instruct_until: float  # λ of the last point of stage 1
    thinking_from: float  # λ of the first point of stage 3

    @property
    def json(self) -> dict[str, Any]:
        return {
            "found": True,
            "instruct_until": self.instruct_until,
            "thinking_from": self.thinking_from,
        }

    def __str__(self) -> str:
        return (
            f"stage 1 up to λ = {self.instruct_until:g}, stage 3 from λ = {self.thinking_from:g} on"
        )


NO_TRANSITION: Final = "no transition found"


def stages(think_rates: Sequence[tuple[float, float]]) -> Stages | None:
    """Returns the stages by `RULE` of points (λ, think rate) in order of λ; None if it has none."""
    rates = [rate for _, rate in think_rates]
    first = next((at for at, rate in enumerate(rates) if rate >= THINKS_RARELY), len(rates))
    last = len(rates)
    while last and rates[last - 1] >= THINKS_NEARLY_ALWAYS:
        last -= 1
    if first == 0 or last == len(rates):
        return None
    return Stages(think_rates[first - 1][0], think_rates[last][0])
