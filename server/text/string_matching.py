"""Finds strings in text that arrives in pieces, and how much of it must be held back."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """Where a string was found: offsets of its start and its end."""

    start: int
    end: int


def first_match(text: str, needles: Sequence[str]) -> Match | None:
    """Returns the match that ends first, or None if none of `needles` occurs.

    So the result does not depend on how the text was cut.
    """
    matches = [
        Match(start, start + len(needle)) for needle in needles if (start := text.find(needle)) >= 0
    ]
    return min(matches, key=lambda match: (match.end, match.start), default=None)


def unfinished_length(text: str, needles: Sequence[str]) -> int:
    """Returns the length of the longest end of `text` that more text may complete to a needle."""
    longest = 0
    for needle in needles:
        for length in range(min(len(needle) - 1, len(text)), longest, -1):
            if text.endswith(needle[:length]):
                longest = length
                break
    return longest
