"""A measurement that runs: its server, its samples, and the report about them."""

import argparse
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from server.sweep.arguments import without_api_keys
from server.sweep.collect import RequestOptions, collect_samples
from server.sweep.curves import ClassReport, measure
from server.sweep.graders import Grader
from server.sweep.grid import Setting, planned_samples
from server.sweep.html_report import write_html
from server.sweep.http_client import ServedPair, ServerClient
from server.sweep.own_server import own_server
from server.sweep.report import table, write_numbers
from server.sweep.samples import Sample, SampleLog
from server.sweep.tasks import Task


class Measurement:
    """One task sent to one server, by the flags of a command."""

    def __init__(
        self,
        flags: argparse.Namespace,
        task: Task,
        grader: Grader,
        client: ServerClient,
        pair: ServedPair,
        folder: Path,
    ) -> None:
        self.flags = flags
        self.task = task
        self.pair = pair
        self._grader = grader
        self._client = client
        self._folder = folder  # of samples and report

    def parameters(self, **more: Any) -> dict[str, Any]:
        """Returns what the samples depend on, for their file and the report."""
        flags = self.flags
        return {
            "model": self.pair.model,
            "pair_identity": self.pair.identity,
            "serve": without_api_keys(flags.serve),
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
        """Opens the file of samples. Raises `BadParameters` if it has those of other parameters."""
        return SampleLog(self._folder / "samples.jsonl", parameters)

    async def collect(
        self, work: Iterable[tuple[Setting, range]], log: SampleLog, progress: "Progress"
    ) -> None:
        """Collects the samples of the settings that the log lacks."""
        await collect_samples(
            planned_samples(work, self.task.questions),
            self._client,
            self.pair,
            RequestOptions(self.flags.seed, self.flags.max_tokens, self._grader),
            log,
            on_sample=progress.count,
        )

    def report(
        self,
        samples: Iterable[Sample],
        curves: Sequence[Sequence[Setting]],
        parameters: Mapping[str, Any],
    ) -> list[ClassReport]:
        """Writes the report, and prints its tables."""
        reports = measure(
            samples, curves, self.task, seed=self.flags.seed, votes=self._grader.votes
        )
        write_numbers(self._folder, reports, parameters)
        write_html(self._folder / "report.html", reports, parameters)
        print("\n\n".join(table(report) for report in reports))
        print(f"\n{self._folder / 'report.html'}")
        return reports


@asynccontextmanager
async def measurement(
    url: str, flags: argparse.Namespace, task: Task, grader: Grader, folder: Path
) -> AsyncIterator[Measurement]:
    """Yields the measurement of `task` at the server of `url`. Raises `SweepError`."""
    async with ServerClient(
        url, api_key=flags.api_key, timeout=flags.timeout, concurrency=flags.concurrency
    ) as client:
        yield Measurement(flags, task, grader, client, await client.pair(flags.model), folder)


@contextmanager
def server_url(flags: argparse.Namespace, folder: Path, *serve: str) -> Iterator[str]:
    """Yields `--url`, or the URL of a server that it starts with `serve` and other flags."""
    if flags.url:
        yield flags.url
        return
    with own_server([*serve, *flags.serve], folder / "server.log") as url:
        yield url


class Progress:
    """A progress bar with the time left and the tokens per second. Use it as a context."""

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
