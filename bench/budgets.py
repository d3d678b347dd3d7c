"""Measures the score that a budget of reasoning tokens buys, with routing and with a fixed λ.

    python -m bench.budgets [--budgets 0,5,10] [--questions 150] [--samples 8] [--seed 1]

Runs the embedded pair's task at T = 0.7 over HTTP. Every policy gets the same questions, and all
requests share the batches. The policies, each with the budget as a hard cap:

    routed          only the budget: λ from the curve of all questions
    routed, class   the budget and the question's class: λ from the curve of that class
    λ = 0.7         the first λ of stage 3 in the built-in profile, and the budget
    λ = 1           λ = 1 and the budget: the think block is closed when the budget is used up

λ = 0 and λ = 1 without a budget are measured too. The default seed differs from the seed of the
questions that the built-in profile was measured on. Writes `bench/results/budgets.json`, from which
`bench.three_stages` makes the tables and the picture.
"""

import argparse
import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from bench.measuring.folders import RESULTS
from bench.measuring.publishing import machine, rounded
from server.routing.profiles import DEFAULT_CLASS
from server.sweep.collect import RequestOptions, read_answer, request_body
from server.sweep.estimates import RESAMPLES, estimate, grouped
from server.sweep.graders import grader_named
from server.sweep.grid import ALL, Decoding, PlannedSample, Setting
from server.sweep.http_client import ServedPair, ServerClient
from server.sweep.own_server import own_server
from server.sweep.samples import Sample
from server.sweep.tasks import EMBEDDED, Task, embedded_task

BUDGETS = "0,5,10,15,20,30,40,60,80,120"
CONCURRENCY = 128
ROUTED, ROUTED_BY_CLASS, EARLY, CUT = "routed", "routed, class", "λ = 0.7", "λ = 1"
KEPT = ("mean_at_k", "tokens_mean", "reasoning_tokens_mean", "reasoning_tokens_p90", "think_rate",
        "malformed", "unfinished")  # fmt: skip
_SETTING = Setting(1.0, ALL, Decoding(0.7, 1.0))


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to spend a budget. A budget of None means no budget."""

    name: str
    budget: int | None
    explicit: float | None  # λ, or None if the router chooses it

    def body(self, unit: PlannedSample, pair: ServedPair, asking: RequestOptions) -> dict[str, Any]:
        body = request_body(unit, pair, asking)
        del body["reasoning_lambda"]
        if self.explicit is not None:
            body["reasoning_lambda"] = self.explicit
        if self.budget is not None:
            body["thinking_token_budget"] = self.budget
        if self.name == ROUTED_BY_CLASS:
            body["routing_class"] = unit.question.kind
        return body


@dataclass(frozen=True, slots=True)
class Answer:
    sample: Sample
    ran: float  # λ
    forced: bool  # the server closed the think block


Answers = dict[Policy, list[Answer]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", default=BUDGETS)
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    policies = list(policies_of([int(part) for part in given.budgets.split(",")]))
    task = embedded_task(given.questions, given.seed)
    with tempfile.TemporaryDirectory() as folder, own_server([], Path(folder, "server")) as url:
        answers = asyncio.run(ask_all(url, policies, task, given.samples, given.seed))
    record = {
        "bench": "budgets",
        "machine": machine(),
        "parameters": vars(given),
        "classes": {name: rows(answers, task, name) for name in [DEFAULT_CLASS, *task.classes]},
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / "budgets.json"
    target.write_text(json.dumps(rounded(record), ensure_ascii=False) + "\n")
    print(target)


def policies_of(budgets: Sequence[int]) -> Iterator[Policy]:
    yield Policy("λ = 0", None, 0.0)
    yield Policy(CUT, None, 1.0)
    for budget in budgets:
        yield Policy(ROUTED, budget, None)
        yield Policy(ROUTED_BY_CLASS, budget, None)
        yield Policy(EARLY, budget, 0.7)
        yield Policy(CUT, budget, 1.0)


# --- Requests -------------------------------------------------------------------------------------


async def ask_all(
    url: str, policies: Sequence[Policy], task: Task, samples: int, seed: int
) -> Answers:
    answers: Answers = {policy: [] for policy in policies}
    left = iter(list(product(task.questions, range(samples), policies)))
    asking = RequestOptions(seed, None, grader_named(EMBEDDED))
    async with ServerClient(url, api_key=None, timeout=600, concurrency=CONCURRENCY) as server:
        pair = await server.pair(None)

        async def work() -> None:
            for question, sample, policy in left:
                unit = PlannedSample(_SETTING, question, sample)
                response = await server.complete(policy.body(unit, pair, asking))
                answers[policy].append(_answer(unit, policy, response.json(), asking))

        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(work())
    return answers


def _answer(
    unit: PlannedSample, policy: Policy, body: Mapping[str, Any], asking: RequestOptions
) -> Answer:
    sample = read_answer(unit, body, asking.grader)
    routing = body["routing"]
    return Answer(
        replace(sample, setting=f"{policy.name} {policy.budget}"),
        routing["reasoning_lambda"],
        routing.get("forced_close", False),
    )


# --- Numbers --------------------------------------------------------------------------------------


def rows(answers: Answers, task: Task, kind: str) -> list[dict[str, Any]]:
    """Returns one row for each policy, over the questions of one class."""
    questions = {it.id for it in task.questions if kind in (DEFAULT_CLASS, it.kind)}
    own = {
        policy: sorted(
            (it for it in given if it.sample.question in questions),
            key=lambda it: (int(it.sample.question), it.sample.sample),
        )
        for policy, given in answers.items()
    }
    return [_row(policy, own) for policy in own]


def _row(policy: Policy, answers: Answers) -> dict[str, Any]:
    own = answers[policy]
    samples = [it.sample for it in own]
    numbers = estimate(samples, seed=samples[0].setting, votes=False)
    ran = Counter(it.ran for it in own)
    row: dict[str, Any] = {
        "policy": policy.name,
        "budget": policy.budget,
        "lambdas": {f"{value:g}": ran[value] for value in sorted(ran)},
        "answers": len(own),
        "forced_close": fmean(it.forced for it in own),
        "correct_if_forced": _share_correct(it for it in own if it.forced),
        "correct_if_not": _share_correct(it for it in own if not it.forced),
        **{name: numbers[name].value for name in KEPT},
        "intervals": {name: [numbers[name].low, numbers[name].high] for name in KEPT},
    }
    cut = answers.get(Policy(CUT, policy.budget, 1.0))
    if cut is not None and policy.name != CUT:
        row["gain_over_cut"] = _gain(samples, [it.sample for it in cut])
    return row


def _share_correct(answers: Iterable[Answer]) -> float | None:
    correct = [it.sample.correct for it in answers]
    return fmean(correct) if correct else None


def _gain(own: Sequence[Sample], cut: Sequence[Sample]) -> dict[str, float]:
    """Returns the difference in Mean@k on the same questions, with its 95 % bootstrap interval."""
    pairs = zip(grouped(own), grouped(cut), strict=True)
    gains = [
        fmean(it.correct for it in one) - fmean(it.correct for it in two) for one, two in pairs
    ]
    random = Random(own[0].setting)
    drawn = sorted(fmean(random.choices(gains, k=len(gains))) for _ in range(RESAMPLES))
    tail = RESAMPLES // 40
    return {"value": fmean(gains), "low": drawn[tail], "high": drawn[-1 - tail]}


def _score(samples: Sequence[Sample]) -> float:
    return fmean(it.correct for it in samples)


if __name__ == "__main__":
    main()
