"""Qwen3-4B on AIME'25, from tables 2 and 5 of arXiv 2510.10977."""

from typing import Final, NamedTuple


class PaperPoint(NamedTuple):
    reasoning_lambda: float
    score: float  # percent
    tokens: int
    think_rate: float  # percent


AIME_CURVE: Final = [
    PaperPoint(0.0, 46.6, 15097, 0.0),
    PaperPoint(0.2, 52.2, 16794, 0.0),
    PaperPoint(0.4, 55.8, 12448, 1.4),
    PaperPoint(0.45, 58.5, 11290, 14.4),
    PaperPoint(0.5, 62.5, 11189, 59.6),
    PaperPoint(0.55, 67.6, 11634, 91.6),
    PaperPoint(0.6, 71.0, 12681, 100.0),
    PaperPoint(0.8, 80.5, 17574, 99.9),
    PaperPoint(1.0, 80.4, 22813, 99.9),
]
