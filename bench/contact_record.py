"""What first contact keeps: one JSON that is whole at any moment, and one table at its end.

A step is `ok` where its process ended with code 0 and no row tells of an error.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench import gpu_report
from bench.contact_process import Ended, Row

MOST_FIGURES: Final = 4  # of a step, in the table
LONGEST_REASON: Final = 110  # characters, in the table
Told = dict[str, Any]  # a step as it is written


class Record:
    """The steps of one run, or of several where it was resumed."""

    def __init__(self, path: Path, resumed: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()  # rows come from a thread of their own
        self.steps: dict[str, Told] = {}
        self.facts: dict[str, Any] = {}
        if resumed is not None:
            self.steps = json.loads(resumed.read_text())["steps"]

    def is_ok(self, name: str) -> bool:
        return name in self.steps and self.steps[name]["status"] == "ok"

    def begin(self, name: str, command: Sequence[str]) -> None:
        """Forgets what an earlier run told of this step."""
        told = {"status": "running", "seconds": 0.0, "command": list(command), "rows": []}
        with self._lock:
            self.steps[name] = told
        self.write()

    def add(self, name: str, row: Row) -> None:
        with self._lock:
            self.steps[name]["rows"].append(row)
        self.write()

    def end(self, name: str, ended: Ended) -> None:
        with self._lock:
            told = self.steps[name]
            errors = [f"{name_of(row)}: {row['error']}" for row in told["rows"] if "error" in row]
            status = "failed" if errors and ended.status == "ok" else ended.status
            why = "; ".join(filter(None, [ended.why, *errors]))
            told |= {"status": status, "seconds": round(ended.seconds, 1), "why": why}
        self.write()

    def leave_out(self, name: str, why: str) -> None:
        """A step that is not run keeps what an earlier run told of it."""
        with self._lock:
            if name not in self.steps:
                self.steps[name] = {"status": "not run", "seconds": 0.0, "why": why, "rows": []}
        self.write()

    def write(self) -> None:
        """Whole or not at all: a run may be ended at any moment."""
        unfinished = self._path.with_suffix(".part")
        with self._lock:
            text = json.dumps({"bench": "first contact", **self.facts, "steps": self.steps})
            unfinished.write_text(text + "\n")
            unfinished.replace(self._path)

    def table(self, names: Sequence[str]) -> str:
        lines = ["| step | status | seconds | figures |", "|---|---|---|---|"]
        for name in names:
            told = self.steps.get(name)
            if told is None:
                continue
            figures = "; ".join(list(figures_of(told["rows"]))[:MOST_FIGURES])
            said = " — ".join(filter(None, [told.get("why", "")[:LONGEST_REASON], figures]))
            lines.append(f"| {name} | {told['status']} | {told['seconds']:.0f} | {said} |")
        return "\n".join(lines)

    def ratios(self, smoke: bool) -> list[str]:
        """Those that are aimed at, of whatever steps their rows are in."""
        rows = [row for told in self.steps.values() for row in told["rows"] if "model" in row]
        return [str(ratio) for ratio in gpu_report.ratios(rows, smoke)]


def figures_of(rows: Sequence[Row]) -> Iterator[str]:
    """The most telling ones first: those that a step names itself, then its first measured rows."""
    outcomes = Counter(row["outcome"] for row in rows if "outcome" in row)
    if outcomes:
        yield ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    yield from (row["figure"] for row in rows if "figure" in row)
    card = next((row["card"] for row in rows if "card" in row), None)
    if card:
        yield f"{card['bandwidth'] / 1e12:.2f} TB/s, {card['rate'] / 1e12:.0f} TFLOP/s"
    yield from (f"{_sized(row)}: {row['ratio']:.3f}" for row in rows if "ratio" in row)
    for row in rows:
        if "seconds" in row and "tokens_a_second" in row:
            share = f", {row['share']:.0%} of its bound" if "share" in row else ""
            yield f"{_sized(row)}: {row['seconds'] * 1e3:.2f} ms{share}"


def _sized(row: Row) -> str:
    size = f" {row['sequences']}×{row['tokens']}" if row.get("sequences") else ""
    return f"{name_of(row)}, {row['lambdas']} λ{size}"


def name_of(row: Row) -> str:
    return f"{row['subject']} {row.get('what', '')}".strip()
