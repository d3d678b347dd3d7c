"""A finished sweep as numbers: points, curves and classes, and what is written of them.

    report.json   everything, by class and curve        points.csv   one row a point, with intervals

A curve is the points of one dial and one decoding, in order of λ. The page with the pictures is
made in `server.sweep.page`.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Final

from server.routing.profiles import DEFAULT_CLASS
from server.sweep.curves import NO_TRANSITION, RULE, Stages, pareto_front, stages
from server.sweep.estimates import Estimate, estimate, least_samples
from server.sweep.samples import Sample
from server.sweep.settings import ALL, Setting, settings_of
from server.sweep.tasks import Task


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """The numbers of one setting, over the questions of one class."""

    setting: Setting
    questions: int
    samples: int
    k: int
    numbers: Mapping[str, Estimate]

    @property
    def reasoning_lambda(self) -> float:
        return self.setting.reasoning_lambda

    def value(self, name: str) -> float:
        return self.numbers[name].value

    @property
    def told(self) -> dict[str, Any]:
        values = {name: it.value for name, it in self.numbers.items()}
        return {
            **self.head,
            "vote_at_k": None,  # where the grader reads nothing that could be voted on
            **values,
            "intervals": {name: [it.low, it.high] for name, it in self.numbers.items()},
        }

    @property
    def row(self) -> dict[str, Any]:
        row = dict(self.head)
        for name, it in self.numbers.items():
            row |= {name: it.value, f"{name}_low": it.low, f"{name}_high": it.high}
        return row

    @property
    def head(self) -> dict[str, Any]:
        decoding = self.setting.decoding
        return {
            "lambda": self.setting.reasoning_lambda,
            "dial": self.setting.dial,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
            "questions": self.questions,
            "samples": self.samples,
            "k": self.k,
        }


@dataclass(frozen=True, slots=True)
class Curve:
    """The points of one dial and decoding, in order of λ; at least one."""

    points: Sequence[MeasuredPoint]

    @property
    def name(self) -> str:
        """Of its last point: at λ = 0 the decoding may be another."""
        setting = self.points[-1].setting
        dial = "" if setting.dial == ALL else f"λ in {setting.dial} only, "
        return f"{dial}{setting.decoding}"

    @property
    def stages(self) -> Stages | None:
        return stages([(it.reasoning_lambda, it.value("think_rate")) for it in self.points])

    @property
    def front(self) -> list[MeasuredPoint]:
        """Points that no other one beats in mean tokens and Mean@k, by tokens."""
        costs = [(it.value("tokens_mean"), it.value("mean_at_k")) for it in self.points]
        return [self.points[at] for at in pareto_front(costs)]

    @property
    def told(self) -> dict[str, Any]:
        found = self.stages
        return {
            "name": self.name,
            "lambdas": [it.reasoning_lambda for it in self.points],
            "stages": {"found": False} if found is None else found.told,
            "pareto_front": [it.reasoning_lambda for it in self.front],
        }


@dataclass(frozen=True, slots=True)
class ClassReport:
    """The curves over the questions of one class; `default` is all of them."""

    name: str
    curves: Sequence[Curve]

    @property
    def points(self) -> list[MeasuredPoint]:
        """Each once, though curves may share it."""
        unique = {point.setting: point for curve in self.curves for point in curve.points}
        return list(unique.values())

    @property
    def told(self) -> dict[str, Any]:
        return {
            "points": [point.told for point in self.points],
            "curves": [curve.told for curve in self.curves],
        }


def measure(
    samples: Iterable[Sample],
    curves: Sequence[Sequence[Setting]],
    task: Task,
    *,
    seed: int,
    votes: bool,
) -> list[ClassReport]:
    """All questions first, then class by class. Every setting has samples of every question."""
    by_setting: dict[str, list[Sample]] = {}
    for sample in samples:
        by_setting.setdefault(sample.setting, []).append(sample)
    reports = []
    for name in [DEFAULT_CLASS, *task.classes]:
        asked = {it.id for it in task.questions if name in (DEFAULT_CLASS, it.kind)}
        points = {
            it: _point(
                it, [one for one in by_setting[it.label] if one.question in asked], seed, votes
            )
            for it in settings_of(curves)
        }
        reports.append(ClassReport(name, [Curve([points[it] for it in own]) for own in curves]))
    return reports


def _point(setting: Setting, samples: Sequence[Sample], seed: int, votes: bool) -> MeasuredPoint:
    # In an order of its own: answers come in as they finish.
    ordered = sorted(samples, key=lambda it: (it.question, it.sample))
    return MeasuredPoint(
        setting,
        questions=len({it.question for it in ordered}),
        samples=len(ordered),
        k=least_samples(ordered),
        numbers=estimate(ordered, seed=f"{seed} {setting.label}", votes=votes),
    )


def write_numbers(out: Path, reports: Sequence[ClassReport], parameters: Mapping[str, Any]) -> None:
    """`report.json` and `points.csv` in the folder `out`."""
    everything, *classes = reports
    body = {
        "parameters": parameters,
        **everything.told,
        "stage_rule": RULE,
        "classes": {it.name: it.told for it in classes},
    }
    _write(out / "report.json", json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    _write(out / "points.csv", _csv(reports))


def _csv(reports: Sequence[ClassReport]) -> str:
    rows = [{"class": it.name, **point.row} for it in reports for point in it.points]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


# --- The terminal ---------------------------------------------------------------------------------

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
"""Heads, names and formats of the numbers that tables show."""


def table(report: ClassReport) -> str:
    """Every curve of a class as a Markdown table; points of the Pareto front carry a `*`."""
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
