"""Keeps the results of first contact in one JSON file, and makes the table at the end.

A step is `ok` if its process ended with code 0, no row reports an error, and none was skipped for
lack of time. If only the last of these fails, the step is `partial`.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench.first_contact.process_group import Ended, Row
from bench.gpu.cases import OUT_OF_TIME
from bench.gpu.ratios import ratios

MOST_FIGURES: Final = 4  # figures of a step in the table
LONGEST_REASON: Final = 110  # characters in the table
StepRecord = dict[str, Any]  # a step as it is written


class Record:
    """The steps of one run, or of several if it was resumed."""

    def __init__(self, path: Path, earlier: dict[str, StepRecord] | None = None) -> None:
        """`earlier` contains the steps of the run that is resumed."""
        self._path = path
        self._lock = threading.Lock()  # rows come from another thread
        self.steps = {} if earlier is None else earlier

    def is_ok(self, name: str) -> bool:
        return self.status(name) == "ok"

    def status(self, name: str) -> str | None:
        return self.steps[name]["status"] if name in self.steps else None

    def begin(self, name: str, command: Sequence[str]) -> None:
        """Forgets what an earlier run recorded of this step."""
        step = {"status": "running", "seconds": 0.0, "command": list(command), "rows": []}
        with self._lock:
            self.steps[name] = step
        self.write()

    def add(self, name: str, row: Row) -> None:
        with self._lock:
            self.steps[name]["rows"].append(row)
        self.write()

    def end(self, name: str, ended: Ended) -> None:
        with self._lock:
            step = self.steps[name]
            errors = [f"{name_of(row)}: {row['error']}" for row in step["rows"] if "error" in row]
            late = sum(row.get("skipped") == OUT_OF_TIME for row in step["rows"])
            skipped_late = f"{late} of {len(step['rows'])} rows {OUT_OF_TIME}" if late else ""
            status = ended.status
            if status == "ok" and (errors or late):
                status = "failed" if errors else "partial"
            why = "; ".join(filter(None, [ended.why, *errors, skipped_late]))
            step |= {"status": status, "seconds": round(ended.seconds, 1), "why": why}
        self.write()

    def leave_out(self, name: str, why: str) -> None:
        """Records that a step does not run, unless an earlier run has recorded it."""
        with self._lock:
            if name not in self.steps:
                self.steps[name] = {"status": "not run", "seconds": 0.0, "why": why, "rows": []}
        self.write()

    def write(self) -> None:
        """Replaces the file in one operation, because a run may be ended at any moment."""
        unfinished = self._path.with_suffix(".part")
        with self._lock:
            text = json.dumps({"bench": "first contact", "steps": self.steps})
            unfinished.write_text(text + "\n")
            unfinished.replace(self._path)

    def table(self, names: Sequence[str]) -> str:
        lines = ["| step | status | seconds | figures |", "|---|---|---|---|"]
        for name in names:
            step = self.steps.get(name)
            if step is None:
                continue
            why = _cell(step.get("why", ""))[:LONGEST_REASON]
            figures = _cell("; ".join(list(figures_of(step["rows"]))[:MOST_FIGURES]))
            cell = " — ".join(filter(None, [why, figures]))
            lines.append(f"| {name} | {step['status']} | {step['seconds']:.0f} | {cell} |")
        return "\n".join(lines)

    def ratios(self, smoke: bool) -> list[str]:
        """Returns the ratios that have targets, from the rows of all steps."""
        rows = [row for step in self.steps.values() for row in step["rows"] if "model" in row]
        return [str(ratio) for ratio in ratios(rows, smoke)]


def steps_of(file: Path) -> dict[str, StepRecord]:
    """Returns the steps of an earlier run. Raises ValueError or OSError if `file` has none."""
    found = json.loads(file.read_text())
    steps = found.get("steps") if isinstance(found, dict) else None
    if not isinstance(steps, dict) or not all(map(_is_step, steps.values())):
        raise ValueError("not a record of first contact")
    return steps


def _is_step(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and isinstance(found.get("status"), str)
        and isinstance(found.get("seconds"), int | float)
        and isinstance(found.get("rows"), list)
        and all(isinstance(row, dict) and "subject" in row for row in found["rows"])
    )


def _cell(text: str) -> str:
    """Returns the text as one line without `|`: CUDA's errors have several lines."""
    return " ".join(text.split()).replace("|", "/")


def figures_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the most important figures first: those that a step names, then measured rows."""
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
