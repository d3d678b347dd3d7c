"""The results of the GPU bench: a JSON file that is complete after every row, and ratios with
targets.

No torch. `ratios` also accepts the rows of several runs together.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Final, Literal

from bench.gpu_bounds import Card, Work, card_named
from bench.gpu_cases import Lambdas, Row, Run, Scale, Subject, What

SPOKEN: Final[dict[Lambdas, str]] = {
    "one": "one λ",
    "different": "different λ",
    "never seen": "a λ never seen",
    "instruct": "λ = 0",
    "thinking": "λ = 1",
}


class Report:
    """The rows of one run as they arrive. Rows after the card's are compared with its bounds."""

    def __init__(self, run: Run, subjects: Sequence[str], folder: Path) -> None:
        self._run = run
        self._card: Card | None = None
        kinds = {"compiled": run.compiled, "smoke": run.smoke}
        name = "-".join(["gpu", run.model, *subjects, *(kind for kind in kinds if kinds[kind])])
        self._path = folder / f"{name}.json"
        self.rows: list[Row] = []

    @property
    def failed(self) -> bool:
        """Whether there was an error, or all rows were skipped: then nothing is known."""
        return any("error" in row for row in self.rows) or all(
            "skipped" in row for row in self.rows
        )

    def add(self, row: Row) -> None:
        """Stores a row and prints it, as JSON and as a line to read."""
        if "card" in row:
            self._card = Card(**row["card"])
        elif "machine" in row and self._card is None:
            self._card = card_named(row["machine"]["device"])
        own = {"model": self._run.model, "compiled": self._run.compiled, **self._bound(row)}
        self.rows.append(row | own)
        self._write({})
        print(json.dumps(self.rows[-1], ensure_ascii=False))
        print(line_of(self.rows[-1]), flush=True)

    def finish(self, seconds: float) -> None:
        found = ratios(self.rows, self._run.smoke)
        listed = {ratio.name: {**asdict(ratio), "met": ratio.met} for ratio in found}
        self._write({"ratios": listed, "seconds": seconds})
        for ratio in found:
            print(ratio)
        print(f"{seconds:.0f} s; {self._path}")

    def _bound(self, row: Row) -> Row:
        if self._card is None or "work" not in row:
            return {}
        work = Work(**row["work"])
        seconds, by = self._card.bound(work)
        return {
            "bound_seconds": seconds,
            "bound_by": by,
            "bound_measured": self._card.measured,
            "share": seconds / row["seconds"],
            "bandwidth_share": work.bytes / row["seconds"] / self._card.bandwidth,
        }

    def _write(self, ended: Row) -> None:
        """Replaces the file in one operation, because a run may be ended at any moment."""
        unfinished = self._path.with_suffix(".part")
        record = {"bench": self._path.stem, "rows": self.rows, **ended}
        unfinished.write_text(json.dumps(record, ensure_ascii=False) + "\n")
        unfinished.replace(self._path)


def line_of(row: Row) -> str:
    name = f"{row['subject']:<9} {row['what']}"
    if row["sequences"]:
        name += f", {SPOKEN[row['lambdas']]}, {row['sequences']} × {row['tokens']}"
    parts = []
    if engine := row.get("engine"):
        facts = ("attention", "graphs", "pair_kernels")
        parts += [f"{fact}: {engine[fact]}" for fact in facts if engine[fact]]
        parts.append(f"{engine['pair_seconds']:.1f} + {engine['start_seconds']:.1f} s")
    if card := row.get("card"):
        parts.append(f"{card['bandwidth'] / 1e12:.3g} TB/s, {card['rate'] / 1e12:.4g} TFLOP/s")
    if "seconds" in row:
        parts.append(f"{row['seconds'] * 1e3:,.3f} ms, {row['tokens_a_second']:,.0f} tokens/s")
    if "share" in row:
        kind = row["bound_by"] if row["bound_measured"] else f"{row['bound_by']}, nominal"
        parts.append(f"{row['share']:.0%} of its bound ({kind})")
    for instead in ("skipped", "error"):
        if instead in row:
            parts.append(f"{instead}: {' '.join(row[instead].split())}")
    return ": ".join([name, "; ".join(parts)]) if parts else name


# --- Ratios ---------------------------------------------------------------------------------------


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
    """Returns the ratios whose rows exist, of one run or of several together, separately for each
    model and for compiled rows. Rates are tokens a second, at the most important sizes.
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
