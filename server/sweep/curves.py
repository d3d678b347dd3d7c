"""What a curve of points shows: the three stages, and the points that no other one beats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

THINKS_RARELY: Final = 0.1
THINKS_NEARLY_ALWAYS: Final = 0.9
RULE: Final = (
    f"stage 1: the first points, with a think rate below {THINKS_RARELY:g}; stage 3: the last "
    f"points, with one of at least {THINKS_NEARLY_ALWAYS:g}; stage 2: between them. Without a "
    "stage 1 or a stage 3 no transition was found"
)


@dataclass(frozen=True, slots=True)
class Stages:
    """The three stages of a curve that has them."""

    instruct_until: float  # λ of the last point of stage 1
    thinking_from: float  # λ of the first point of stage 3

    @property
    def told(self) -> dict[str, Any]:
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
    """Of points (λ, think rate) in order of λ; None: no transition found. See `RULE`."""
    rates = [rate for _, rate in think_rates]
    first = next((at for at, rate in enumerate(rates) if rate >= THINKS_RARELY), len(rates))
    last = len(rates)
    while last and rates[last - 1] >= THINKS_NEARLY_ALWAYS:
        last -= 1
    if first == 0 or last == len(rates):
        return None
    return Stages(think_rates[first - 1][0], think_rates[last][0])


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points (tokens, score) such that no other one has as few tokens and as high a
    score, and is better in one of them; by tokens. Of equal points the first stands for all."""
    order = sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1], at))
    front: list[int] = []
    for at in order:
        if not front or points[at][1] > points[front[-1]][1]:
            front.append(at)
    return front
