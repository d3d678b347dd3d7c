"""Runs a calibration: samples in rounds, as `calibration_plan` decides, then the profile."""

import argparse
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from server.routing.profiles import (
    DEFAULT_CLASS,
    MeasuredLengths,
    MeasuredPair,
    Point,
    Profile,
    RoutingClass,
    Source,
)
from server.sweep.calibration_plan import MeasuredLambda, Rules, next_round
from server.sweep.curves import ClassReport, MeasuredPoint
from server.sweep.errors import BadParameters
from server.sweep.estimates import grouped, least_samples, sampling_width
from server.sweep.graders import Grader
from server.sweep.grid import Decoding, Setting, curves_of
from server.sweep.http_client import ServedPair
from server.sweep.measurement import Measurement, Progress, measurement
from server.sweep.samples import Sample, SampleLog
from server.sweep.tasks import Task

LEAST_QUESTIONS = 10
"""A class with fewer questions is left out of the profile: its curve would be noise."""


def work_folder(out: Path) -> Path:
    """Returns the folder of a calibration's samples and report."""
    return out.with_name(out.name + ".work")


async def run_calibration(
    url: str, flags: argparse.Namespace, task: Task, grader: Grader, command: str
) -> None:
    """Calibrates the pair at the server of `url`, and writes report and profile.

    `command` is recorded in the profile. Raises `SweepError`.
    """
    rules = _rules(flags, len(task.questions))
    async with measurement(url, flags, task, grader, work_folder(flags.out)) as run:
        parameters = run.parameters(**_parameters(flags, rules))
        with run.open_log(parameters) as log, Progress(rules.budget, len(log.samples)) as progress:
            curve = await _collect_in_rounds(run, rules, log, progress)
    reports = run.report(log.samples.values(), [curve], parameters)
    source = Source(
        description=f"{len(log.samples)} answers to {len(task.questions)} questions "
        f"({task.name}), {curve[-1].decoding}",
        command=command,
        date=time.strftime("%Y-%m-%d"),
    )
    profile = calibrated_profile(
        reports,
        run.pair,
        name=flags.name or run.pair.model,
        think_threshold=flags.think_threshold,
        source=source,
    )
    profile.save(flags.out)
    print(flags.out)


async def _collect_in_rounds(
    run: Measurement, rules: Rules, log: SampleLog, progress: Progress
) -> list[Setting]:
    """Collects round after round until the plan is empty. Returns the settings in order of λ."""
    counts: dict[Setting, int] = {}
    questions = len(run.task.questions)
    while plan := next_round(measured_so_far(log.samples.values(), counts), questions, rules):
        counts |= {_setting(run.flags, value): count for value, count in plan.items()}
        await run.collect([(it, range(count)) for it, count in counts.items()], log, progress)
    return sorted(counts, key=lambda it: it.reasoning_lambda)


def _setting(flags: argparse.Namespace, value: float) -> Setting:
    ((setting,),) = curves_of(
        [value],
        ["all"],
        [flags.temperature],
        [flags.top_p],
        flags.top_k,
        flags.instruct_decoding,
    )
    return setting


def _rules(flags: argparse.Namespace, questions: int) -> Rules:
    grid = tuple(sorted(flags.lambdas))
    first = len(grid) * flags.samples * questions
    budget = 3 * first if flags.budget_samples is None else flags.budget_samples
    if budget < first:
        raise BadParameters(f"--budget-samples {budget} is less than the first grid needs: {first}")
    return Rules(grid, flags.samples, budget, flags.target_interval, least_gap=flags.least_gap)


def _parameters(flags: argparse.Namespace, rules: Rules) -> dict[str, Any]:
    return {
        "decoding": str(Decoding(flags.temperature, flags.top_p, flags.top_k)),
        "instruct_decoding": flags.instruct_decoding and str(flags.instruct_decoding),
        "think_threshold": flags.think_threshold,
        "grid": rules.grid,
        "samples": rules.samples,
        "target_interval": rules.target_interval,
        "least_gap": rules.least_gap,
        "budget": rules.budget,
    }


def measured_so_far(
    samples: Iterable[Sample], counts: Mapping[Setting, int]
) -> list[MeasuredLambda]:
    """Returns what the first `counts[setting]` samples of each question show, in order of λ.

    Samples of a later round, which the file of a killed run may hold, do not count yet.
    """
    own: dict[str, list[Sample]] = {setting.label: [] for setting in counts}
    most = {setting.label: count for setting, count in counts.items()}
    for sample in samples:
        if sample.sample < most.get(sample.setting, 0):
            own[sample.setting].append(sample)
    ordered = sorted(counts, key=lambda it: it.reasoning_lambda)
    return [_measured(setting, own[setting.label]) for setting in ordered]


def _measured(setting: Setting, samples: Sequence[Sample]) -> MeasuredLambda:
    groups = grouped(sorted(samples, key=lambda it: it.key))  # not in the order of finishing
    correct = [[float(it.correct) for it in own] for own in groups]
    thought = [[float(it.thought) for it in own] for own in groups]
    return MeasuredLambda(
        setting.reasoning_lambda,
        least_samples(samples),
        score=fmean(map(fmean, correct)),
        think_rate=fmean(map(fmean, thought)),
        width=max(sampling_width(correct), sampling_width(thought)),
    )


def calibrated_profile(
    reports: Sequence[ClassReport],
    pair: ServedPair,
    *,
    name: str,
    think_threshold: float,
    source: Source,
) -> Profile:
    """Returns the profile of a calibration, whose reports have one curve each."""
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
