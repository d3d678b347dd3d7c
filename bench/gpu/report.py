"""Prints the rows of the GPU bench, and writes its JSON after every row. It imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench.gpu.bounds import Card, Work, card_named
from bench.gpu.cases import Lambdas, Row, Run
from bench.gpu.ratios import ratios

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
        """Whether there was an error, or all rows were skipped and so nothing was measured."""
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
