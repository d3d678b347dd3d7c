"""Turns samples into points and curves, for all questions and for each routing class.

A curve has the points of one choice of groups and one decoding, in order of λ.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.routing.pareto import pareto_front
from server.routing.profiles import DEFAULT_CLASS
from server.sweep.estimates import Estimate, estimate, least_samples
from server.sweep.grid import ALL, Setting, settings_of
from server.sweep.samples import Sample
from server.sweep.stages import Stages, stages
from server.sweep.tasks import Task


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """The numbers of one setting, over the questions of one class."""

    setting: Setting
    questions: int
    samples: int  # of all questions together
    k: int  # least samples of a question
    numbers: Mapping[str, Estimate]

    @property
    def reasoning_lambda(self) -> float:
        return self.setting.reasoning_lambda

    def value(self, name: str) -> float:
        return self.numbers[name].value

    @property
    def json(self) -> dict[str, Any]:
        values = {name: it.value for name, it in self.numbers.items()}
        return {
            **self.head,
            "vote_at_k": None,  # if the readings of the grader cannot be voted on
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
            "dial": self.setting.groups,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
            "questions": self.questions,
            "samples": self.samples,
            "k": self.k,
        }


@dataclass(frozen=True, slots=True)
class Curve:
    """The points of one choice of groups and one decoding, in order of λ; at least one."""

    points: Sequence[MeasuredPoint]

    @property
    def name(self) -> str:
        """Groups and decoding: that of the last point, as λ = 0 may have another."""
        setting = self.points[-1].setting
        groups = "" if setting.groups == ALL else f"λ in {setting.groups} only, "
        return f"{groups}{setting.decoding}"

    @property
    def stages(self) -> Stages | None:
        return stages([(it.reasoning_lambda, it.value("think_rate")) for it in self.points])

    @property
    def front(self) -> list[MeasuredPoint]:
        """The Pareto front of mean tokens and Mean@k, by rising tokens."""
        return pareto_front(
            self.points,
            tokens=lambda it: it.value("tokens_mean"),
            score=lambda it: it.value("mean_at_k"),
        )

    @property
    def json(self) -> dict[str, Any]:
        found = self.stages
        return {
            "name": self.name,
            "lambdas": [it.reasoning_lambda for it in self.points],
            "stages": {"found": False} if found is None else found.json,
            "pareto_front": [it.reasoning_lambda for it in self.front],
        }


@dataclass(frozen=True, slots=True)
class ClassReport:
    """The curves over the questions of one class; `default` holds all questions."""

    name: str
    curves: Sequence[Curve]

    @property
    def points(self) -> list[MeasuredPoint]:
        """The points of all curves, each once; curves may share points."""
        unique = {point.setting: point for curve in self.curves for point in curve.points}
        return list(unique.values())

    @property
    def json(self) -> dict[str, Any]:
        return {
            "points": [point.json for point in self.points],
            "curves": [curve.json for curve in self.curves],
        }


def measure(
    samples: Iterable[Sample],
    curves: Sequence[Sequence[Setting]],
    task: Task,
    *,
    seed: int,
    votes: bool,
) -> list[ClassReport]:
    """Returns the curves of all questions first, then those of each class.

    Every setting must have samples of every question. Without `votes` there is no Vote@k.
    """
    by_setting: dict[str, list[Sample]] = {}
    for sample in samples:
        by_setting.setdefault(sample.setting, []).append(sample)
    reports = []
    for name in [DEFAULT_CLASS, *task.classes]:
        questions = {it.id for it in task.questions if name in (DEFAULT_CLASS, it.kind)}
        points = {
            it: _point(
                it, [one for one in by_setting[it.label] if one.question in questions], seed, votes
            )
            for it in settings_of(curves)
        }
        reports.append(ClassReport(name, [Curve([points[it] for it in own]) for own in curves]))
    return reports


def _point(setting: Setting, samples: Sequence[Sample], seed: int, votes: bool) -> MeasuredPoint:
    # Sorted, because answers come in as they finish.
    ordered = sorted(samples, key=lambda it: (it.question, it.sample))
    return MeasuredPoint(
        setting,
        questions=len({it.question for it in ordered}),
        samples=len(ordered),
        k=least_samples(ordered),
        numbers=estimate(ordered, seed=f"{seed} {setting.label}", votes=votes),
    )
