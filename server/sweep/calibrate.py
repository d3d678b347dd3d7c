"""A calibration: samples in rounds, as `adaptive` plans them, and the profile that they make."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from server.routing.profiles import (
    DEFAULT_CLASS,
    MeasuredLengths,
    MeasuredPair,
    Point,
    Profile,
    RoutingClass,
    Source,
)
from server.sweep.adaptive import Measured
from server.sweep.asking import ServedPair
from server.sweep.estimates import grouped, least_samples, sampling_width
from server.sweep.report import ClassReport, MeasuredPoint
from server.sweep.samples import Sample
from server.sweep.settings import Setting

LEAST_QUESTIONS = 10
"""A class with fewer of them is not written: its curve would be noise."""


def measured_so_far(samples: Iterable[Sample], asked: Mapping[Setting, int]) -> list[Measured]:
    """In order of λ, from the first `asked[setting]` samples of each question.

    What the file of a killed run holds of a later round does not count yet.
    """
    own: dict[str, list[Sample]] = {setting.label: [] for setting in asked}
    most = {setting.label: count for setting, count in asked.items()}
    for sample in samples:
        if sample.sample < most.get(sample.setting, 0):
            own[sample.setting].append(sample)
    ordered = sorted(asked, key=lambda it: it.reasoning_lambda)
    return [_measured(setting, own[setting.label]) for setting in ordered]


def _measured(setting: Setting, samples: Sequence[Sample]) -> Measured:
    groups = grouped(sorted(samples, key=lambda it: it.key))  # not as they happened to finish
    correct = [[float(it.correct) for it in own] for own in groups]
    thought = [[float(it.thought) for it in own] for own in groups]
    return Measured(
        setting.reasoning_lambda,
        least_samples(samples),
        score=fmean(map(fmean, correct)),
        think_rate=fmean(map(fmean, thought)),
        width=max(sampling_width(correct), sampling_width(thought)),
    )


def profile_of(
    reports: Sequence[ClassReport],
    pair: ServedPair,
    *,
    name: str,
    think_threshold: float,
    source: Source,
) -> Profile:
    """The profile of a calibration with one curve."""
    return Profile(
        name=name,
        pair=MeasuredPair(identity=pair.identity, instruct=pair.instruct, thinking=pair.thinking),
        think_threshold=think_threshold,
        classes={
            report.name: RoutingClass(points=tuple(map(_profile_point, report.points)))
            for report in reports
            if report.name == DEFAULT_CLASS or report.points[0].questions >= LEAST_QUESTIONS
        },
        source=source,
    )


def _profile_point(point: MeasuredPoint) -> Point:
    score = point.numbers["mean_at_k"]
    lengths = [point.value(f"reasoning_tokens_{name}") for name in ("mean", "p50", "p90")]
    return Point(
        reasoning_lambda=point.reasoning_lambda,
        score=round(score.value, 4),
        score_interval=(round(score.low, 4), round(score.high, 4)),
        reasoning_tokens=MeasuredLengths(mean=round(lengths[0], 2), p50=lengths[1], p90=lengths[2]),
        answer_tokens=round(point.value("answer_tokens_mean"), 2),
        think_rate=round(point.value("think_rate"), 4),
        samples=point.samples,
    )
