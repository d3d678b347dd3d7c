"""Finding strings in text that arrives in pieces: what must be held back, and what ended first."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    start: int
    end: int


def first_match(text: str, needles: Sequence[str]) -> Match | None:
    """The occurrence that is complete first, so that the way a text is cut makes no difference."""
    matches = [
        Match(start, start + len(needle)) for needle in needles if (start := text.find(needle)) >= 0
    ]
    return min(matches, key=lambda match: (match.end, match.start), default=None)


def unfinished_length(text: str, needles: Sequence[str]) -> int:
    """Length of the longest end of `text` that may still become one of `needles`."""
    longest = 0
    for needle in needles:
        for length in range(min(len(needle) - 1, len(text)), longest, -1):
            if text.endswith(needle[:length]):
                longest = length
                break
    return longest
