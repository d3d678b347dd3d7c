"""Runs a sweep: the samples of every setting, then the report."""

import argparse
from collections.abc import Sequence
from typing import Any

from server.sweep.graders import Grader
from server.sweep.grid import Setting, ablation_groups, curves_of, lambda_field, settings_of
from server.sweep.measurement import Progress, measurement
from server.sweep.tasks import Task


async def run_sweep(url: str, flags: argparse.Namespace, task: Task, grader: Grader) -> None:
    """Measures every λ at the server of `url`, and writes the report. Raises `SweepError`."""
    async with measurement(url, flags, task, grader, flags.out) as run:
        curves = _curves(flags, run.pair.layers)
        settings = settings_of(curves)
        parameters = run.parameters(**_parameters(flags, curves))
        total = len(settings) * flags.samples * len(task.questions)
        with run.open_log(parameters) as log, Progress(total, len(log.samples)) as progress:
            await run.collect([(it, range(flags.samples)) for it in settings], log, progress)
    run.report(log.samples.values(), curves, parameters)


def _parameters(flags: argparse.Namespace, curves: Sequence[Sequence[Setting]]) -> dict[str, Any]:
    """Returns the parameters that distinguish the settings of this sweep from those of another."""
    return {
        "samples": flags.samples,
        "lambdas": [setting.reasoning_lambda for setting in curves[0]],
        "dials": list(dict.fromkeys(curve[0].groups for curve in curves)),
        "temperature": flags.temperature,
        "top_p": flags.top_p,
        "top_k": flags.top_k,
        "instruct_decoding": flags.instruct_decoding and str(flags.instruct_decoding),
    }


def _curves(flags: argparse.Namespace, layers: int) -> list[list[Setting]]:
    groups = ablation_groups(layers) if flags.ablate else flags.dials
    for chosen in groups:
        lambda_field(chosen, 0.0, layers)  # raises before the first request
    return curves_of(
        flags.lambdas, groups, flags.temperature, flags.top_p, flags.top_k, flags.instruct_decoding
    )
