"""Computes the ratios of the GPU bench's rows that have targets. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, median
from typing import Final, Literal

from bench.gpu.cases import Lambdas, Row, Run, Scale, Subject, What


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure and its target, which is a minimum or a maximum."""

    name: str
    value: float
    aim: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.aim if self.at_most else self.value >= self.aim

    def __str__(self) -> str:
        sign, verdict = "≤" if self.at_most else "≥", "met" if self.met else "missed"
        return f"{self.name}: {self.value:.3f} ({sign} {self.aim}: {verdict})"


Key = tuple[Subject | Literal["served"], What | Literal["HTTP in turn", "engine in turn"], Lambdas]
STATIC: Final[Key] = ("static", "decode", "one")
SHARES: Final[dict[str, Key]] = {
    "static": STATIC,
    "hot λ": ("pair", "decode", "one"),
    "different λ": ("pair", "decode", "different"),
}
RATES: Final[tuple[tuple[str, float, Key, Key], ...]] = (
    ("hot λ / static", 0.97, ("pair", "decode", "one"), STATIC),
    ("λ = 0 / static", 0.98, ("pair", "decode", "instruct"), STATIC),
    ("λ = 1 / static", 0.98, ("pair", "decode", "thinking"), STATIC),
    ("different λ / static", 0.48, ("pair", "decode", "different"), STATIC),
    ("different λ of an int8 delta / static", 0.62, ("int8", "decode", "different"), STATIC),
    ("different λ of an int4 delta / static", 0.74, ("int4", "decode", "different"), STATIC),
    (
        "hot λ / continuous batching of transformers",
        3.0,
        ("pair", "answers", "one"),
        ("batching", "answers", "one"),
    ),
    (
        "64 streams over HTTP at different λ / the engine alone",
        0.95,
        ("served", "HTTP in turn", "different"),
        ("served", "engine in turn", "different"),
    ),
    (
        "64 streams over HTTP at a hot λ / the engine alone",
        0.95,
        ("served", "HTTP in turn", "one"),
        ("served", "engine in turn", "one"),
    ),
)
FIRST_TOKEN: Final[Key] = ("pair", "first token", "never seen")


def ratios(rows: Iterable[Row], smoke: bool = False) -> list[Ratio]:
    """Returns the ratios whose rows exist, of one run or of several together.

    Each model has ratios of its own, and so do its compiled rows. Rates are tokens a second, at the
    most important sizes.
    """
    measured = [row for row in rows if "seconds" in row and _is_main(row, Run("", smoke).scale)]
    found: list[Ratio] = []
    for kind in dict.fromkeys((row["model"], row["compiled"]) for row in measured):
        model, compiled = kind
        own = [row for row in measured if (row["model"], row["compiled"]) == kind]
        own += [
            row for row in measured  # which was compiled in any case
            if compiled and row["model"] == model and row["subject"] == "batching"
        ]  # fmt: skip
        found += _ratios_of(own, f"{model}{' compiled' * compiled}: ")
    return found


def _ratios_of(rows: list[Row], prefix: str) -> list[Ratio]:
    rates = _means(rows, "tokens_a_second")
    shares = _means([row for row in rows if row.get("bound_measured")], "bandwidth_share")
    found = [
        Ratio(prefix + name, rates[top] / rates[bottom], aim)
        for name, aim, top, bottom in RATES
        if top in rates and bottom in rates
    ]
    found += [
        Ratio(f"{prefix}{name}, share of the copy bandwidth", shares[key], 0.70)
        for name, key in SHARES.items()
        if key in shares
    ]
    for row in rows:
        if _key(row) == FIRST_TOKEN:
            value = row["seconds"] / median(row["facts"]["hot_seconds"])
            found.append(Ratio(f"{prefix}never-seen λ / hot λ, first token", value, 1.1, True))
    return found


def _is_main(row: Row, scale: Scale) -> bool:
    size = row["sequences"], row["tokens"]
    match row["what"]:
        case "decode":
            return size == scale.decodes[0]
        case "first token":
            return size == (1, scale.prompts[0])
    return True


def _means(rows: list[Row], figure: str) -> dict[Key, float]:
    """Averages rows that were measured twice."""
    found: dict[Key, list[float]] = {}
    for row in rows:
        found.setdefault(_key(row), []).append(row[figure])
    return {key: mean(values) for key, values in found.items()}


def _key(row: Row) -> Key:
    return row["subject"], row["what"], row["lambdas"]
