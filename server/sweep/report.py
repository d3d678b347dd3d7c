"""Writes a finished measurement as numbers, to files and to the terminal.

    report.json   everything, by class and curve
    points.csv    one row for each point, with intervals

`server.sweep.html_report` writes the page with the plots.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Final

from server.routing.profiles import DEFAULT_CLASS
from server.sweep.curves import ClassReport, Curve, MeasuredPoint
from server.sweep.stages import NO_TRANSITION, RULE


def write_numbers(out: Path, reports: Sequence[ClassReport], parameters: Mapping[str, Any]) -> None:
    """Writes `report.json` and `points.csv` to the folder `out`."""
    everything, *classes = reports
    body = {
        "parameters": parameters,
        **everything.json,
        "stage_rule": RULE,
        "classes": {it.name: it.json for it in classes},
    }
    replace_file(out / "report.json", json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    replace_file(out / "points.csv", _csv(reports))


def _csv(reports: Sequence[ClassReport]) -> str:
    rows = [{"class": it.name, **point.row} for it in reports for point in it.points]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def replace_file(path: Path, text: str) -> None:
    """Writes `text` to `path`; a reader sees the old content or the new one, and never a part."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


COLUMNS: Final = (
    ("think", "think_rate", "{:.3f}"),
    ("Mean@k", "mean_at_k", "{:.3f}"),
    ("Pass@k", "pass_at_k", "{:.3f}"),
    ("Vote@k", "vote_at_k", "{:.3f}"),
    ("tokens", "tokens_mean", "{:.1f}"),
    ("tokens p50", "tokens_p50", "{:.0f}"),
    ("tokens p90", "tokens_p90", "{:.0f}"),
    ("reasoning", "reasoning_tokens_mean", "{:.1f}"),
    ("reasoning p50", "reasoning_tokens_p50", "{:.0f}"),
    ("reasoning p90", "reasoning_tokens_p90", "{:.0f}"),
    ("malformed", "malformed", "{:.3f}"),
    ("unfinished", "unfinished", "{:.3f}"),
)
"""Headings, names and formats of the numbers that tables show."""


def table(report: ClassReport) -> str:
    """Returns every curve of a class as a Markdown table; `*` marks the points of the front."""
    return "\n\n".join(_curve_table(report.name, curve) for curve in report.curves)


def _curve_table(name: str, curve: Curve) -> str:
    points = curve.points
    title = "all questions" if name == DEFAULT_CLASS else f"class {name}"
    found = curve.stages
    lines = [
        f"{title} ({points[0].questions}), {curve.name}: {found or NO_TRANSITION}",
        "| λ | k | Mean@k 95 % | " + " | ".join(head for head, _, _ in COLUMNS) + " |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    best = curve.front
    return "\n".join(lines + [_row(point, on_front=point in best) for point in points])


def _row(point: MeasuredPoint, *, on_front: bool) -> str:
    score = point.numbers["mean_at_k"]
    cells = [
        form.format(point.value(name)) if name in point.numbers else "–"
        for _, name, form in COLUMNS
    ]
    mark = "*" if on_front else ""
    head = f"| {point.reasoning_lambda:g}{mark} | {point.k} | {score.low:.3f}–{score.high:.3f} | "
    return head + " | ".join(cells) + " |"
