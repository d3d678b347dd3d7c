"""A measurement under way: the server it asks, its samples, and the reports that they make."""

import argparse
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from server.routing.profiles import Source
from server.sweep.adaptive import Rules, next_round
from server.sweep.asking import Asking, ServedPair, Server, ask_all
from server.sweep.calibrate import measured_so_far, profile_of
from server.sweep.child import own_server
from server.sweep.errors import BadParameters
from server.sweep.flags import told
from server.sweep.graders import Grader
from server.sweep.page import write_page
from server.sweep.report import ClassReport, measure, table, write_numbers
from server.sweep.samples import Sample, SampleLog
from server.sweep.settings import (
    Decoding,
    Setting,
    ablation_dials,
    curves_of,
    settings_of,
    units_of,
    wire_dial,
)
from server.sweep.tasks import Task


class Run:
    """One task put to one server, by the flags of a command."""

    def __init__(
        self,
        flags: argparse.Namespace,
        task: Task,
        grader: Grader,
        server: Server,
        pair: ServedPair,
        folder: Path,
    ) -> None:
        self.flags = flags
        self.task = task
        self.pair = pair
        self._grader = grader
        self._server = server
        self._folder = folder  # of samples and report

    def parameters(self, **more: Any) -> dict[str, Any]:
        """What the samples depend on: pinned in their file and told in the report."""
        flags = self.flags
        return {
            "model": self.pair.model,
            "pair_identity": self.pair.identity,
            "serve": told(flags.serve),
            "task": self.task.name,
            "questions": len(self.task.questions),
            "questions_digest": self.task.digest,
            "grader": flags.grader,
            "pattern": flags.pattern,
            "seed": flags.seed,
            "max_tokens": flags.max_tokens,
            **more,
        }

    def open_log(self, parameters: Mapping[str, Any]) -> SampleLog:
        return SampleLog(self._folder / "samples.jsonl", parameters)

    async def ask(
        self, work: Iterable[tuple[Setting, range]], log: SampleLog, progress: "Progress"
    ) -> None:
        """Have every sample of the settings that the log lacks."""
        await ask_all(
            units_of(work, self.task.questions),
            self._server,
            self.pair,
            Asking(self.flags.seed, self.flags.max_tokens, self._grader),
            log,
            on_sample=progress.count,
        )

    def report(
        self,
        samples: Iterable[Sample],
        curves: Sequence[Sequence[Setting]],
        parameters: Mapping[str, Any],
    ) -> list[ClassReport]:
        """Write the report, and print its tables."""
        reports = measure(
            samples, curves, self.task, seed=self.flags.seed, votes=self._grader.votes
        )
        write_numbers(self._folder, reports, parameters)
        write_page(self._folder / "report.html", reports, parameters)
        print("\n\n".join(table(report) for report in reports))
        print(f"\n{self._folder / 'report.html'}")
        return reports


@asynccontextmanager
async def running(
    url: str, flags: argparse.Namespace, task: Task, grader: Grader, folder: Path
) -> AsyncIterator[Run]:
    async with Server(
        url, api_key=flags.api_key, timeout=flags.timeout, concurrency=flags.concurrency
    ) as server:
        yield Run(flags, task, grader, server, await server.pair(flags.model), folder)


@contextmanager
def server_url(flags: argparse.Namespace, folder: Path, *serve: str) -> Iterator[str]:
    """That of `--url`, or of a server of its own, which gets the flags `serve` as well."""
    if flags.url:
        yield flags.url
        return
    with own_server([*serve, *flags.serve], folder / "server.log") as url:
        yield url


class Progress:
    """A bar with the time that is left and the tokens of a second. Use it as a context."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, unit=" answers", disable=None)
        self._started = time.perf_counter()
        self._tokens = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self, sample: Sample) -> None:
        self._tokens += sample.tokens
        rate = self._tokens / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update()


# --- sweep ----------------------------------------------------------------------------------------


async def run_sweep(url: str, flags: argparse.Namespace, task: Task, grader: Grader) -> None:
    async with running(url, flags, task, grader, flags.out) as run:
        curves = _curves(flags, run.pair.layers)
        settings = settings_of(curves)
        parameters = run.parameters(**_grid(flags, curves))
        total = len(settings) * flags.samples * len(task.questions)
        with run.open_log(parameters) as log, Progress(total, len(log.samples)) as progress:
            await run.ask([(it, range(flags.samples)) for it in settings], log, progress)
    run.report(log.samples.values(), curves, parameters)


def _grid(flags: argparse.Namespace, curves: Sequence[Sequence[Setting]]) -> dict[str, Any]:
    """What tells this sweep's settings from another's."""
    return {
        "samples": flags.samples,
        "lambdas": [setting.reasoning_lambda for setting in curves[0]],
        "dials": list(dict.fromkeys(curve[0].dial for curve in curves)),
        "temperature": flags.temperature,
        "top_p": flags.top_p,
        "top_k": flags.top_k,
        "instruct_decoding": flags.instruct_decoding and str(flags.instruct_decoding),
    }


def _curves(flags: argparse.Namespace, layers: int) -> list[list[Setting]]:
    dials = ablation_dials(layers) if flags.ablate else flags.dials
    for dial in dials:
        wire_dial(dial, 0.0, layers)  # refused before the first question
    return curves_of(
        flags.lambdas, dials, flags.temperature, flags.top_p, flags.top_k, flags.instruct_decoding
    )


# --- calibrate ------------------------------------------------------------------------------------


def work_folder(out: Path) -> Path:
    """Of a calibration's samples and report."""
    return out.with_name(out.name + ".work")


async def run_calibration(
    url: str, flags: argparse.Namespace, task: Task, grader: Grader, command: str
) -> None:
    """`command` is told in the profile."""
    rules = _rules(flags, len(task.questions))
    async with running(url, flags, task, grader, work_folder(flags.out)) as run:
        parameters = run.parameters(**_pinned(flags, rules))
        with run.open_log(parameters) as log, Progress(rules.budget, len(log.samples)) as progress:
            curve = await _ask_in_rounds(run, rules, log, progress)
    reports = run.report(log.samples.values(), [curve], parameters)
    source = Source(
        description=f"{len(log.samples)} answers to {len(task.questions)} questions "
        f"({task.name}), {curve[-1].decoding}",
        command=command,
        date=time.strftime("%Y-%m-%d"),
    )
    profile = profile_of(
        reports,
        run.pair,
        name=flags.name or run.pair.model,
        think_threshold=flags.think_threshold,
        source=source,
    )
    profile.save(flags.out)
    print(flags.out)


async def _ask_in_rounds(
    run: Run, rules: Rules, log: SampleLog, progress: Progress
) -> list[Setting]:
    """Round after round until the plan is empty; the settings in order of λ."""
    asked: dict[Setting, int] = {}
    questions = len(run.task.questions)
    while plan := next_round(measured_so_far(log.samples.values(), asked), questions, rules):
        asked |= {_setting(run.flags, value): count for value, count in plan.items()}
        await run.ask([(it, range(count)) for it, count in asked.items()], log, progress)
    return sorted(asked, key=lambda it: it.reasoning_lambda)


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
        raise BadParameters(f"--budget-samples {budget} is less than the first grid takes: {first}")
    return Rules(grid, flags.samples, budget, flags.target_interval, least_gap=flags.least_gap)


def _pinned(flags: argparse.Namespace, rules: Rules) -> dict[str, Any]:
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
