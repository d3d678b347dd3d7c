"""Collects samples: sends every planned request, grades the answers and logs them.

As in the paper, an answer that never closed its think block is graded with the block's text. An
answer counts as malformed if it ended by itself, and either the grader reads no answer in it or a
tag of the chat template is in its text. An answer that was cut by its length is unfinished, and
never malformed.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

from server.routing.requested_lambda import LAMBDA_HEADER
from server.sweep.errors import BadParameters, SweepError
from server.sweep.graders import Grader
from server.sweep.grid import PlannedSample, lambda_field
from server.sweep.http_client import ServedPair, ServerClient
from server.sweep.samples import Sample, SampleLog

STRAY_TAGS: Final = ("<think>", "</think>", "<tool_call>")


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What all requests of a measurement have in common."""

    seed: int
    max_tokens: int | None  # None: as many as the context holds
    grader: Grader


async def collect_samples(
    plan: Iterable[PlannedSample],
    client: ServerClient,
    pair: ServedPair,
    options: RequestOptions,
    log: SampleLog,
    on_sample: Callable[[Sample], None],
) -> None:
    """Requests every planned sample that the log lacks.

    Raises `SweepError` at the first error; the log keeps the samples that are finished.
    """
    remaining = iter([planned for planned in plan if planned.key not in log.samples])

    async def work() -> None:
        for planned in remaining:
            response = await client.complete(request_body(planned, pair, options))
            _check_lambda(planned, response)
            sample = read_answer(planned, response.json(), options.grader)
            log.add(sample)
            on_sample(sample)

    await _run_several(work, client.concurrency)


async def _run_several(work: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
    """Runs `work` `count` times at once. Raises the first `SweepError` alone, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(work())
    except* SweepError as errors:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def request_body(
    planned: PlannedSample, pair: ServedPair, options: RequestOptions
) -> dict[str, Any]:
    """Returns the chat completion request of a planned sample."""
    setting = planned.setting
    decoding = setting.decoding
    body: dict[str, Any] = {
        "model": pair.model,
        "messages": list(planned.question.messages),
        "reasoning_lambda": lambda_field(setting.groups, setting.reasoning_lambda, pair.layers),
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "seed": planned.seed(options.seed),
    }
    return body if options.max_tokens is None else body | {"max_tokens": options.max_tokens}


def _check_lambda(planned: PlannedSample, response: httpx.Response) -> None:
    """Raises `BadParameters` if the server answered at another λ, because its grid is coarser."""
    requested = f"{planned.setting.reasoning_lambda:g}"
    ran = response.headers.get(LAMBDA_HEADER, "")
    if ran != requested:
        raise BadParameters(
            f"the server ran λ = {requested} as {ran or 'something else'}; "
            "give values on its grid (--lambda-step)"
        )


def read_answer(planned: PlannedSample, body: Mapping[str, Any], grader: Grader) -> Sample:
    """Returns the graded sample of a chat completion's body."""
    choice, usage = body["choices"][0], body["usage"]
    message = choice["message"]
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    unfinished = choice["finish_reason"] == "length"
    reasoning_tokens = usage["completion_tokens_details"]["reasoning_tokens"]
    closed = bool(reasoning or reasoning_tokens) and not (unfinished and not content)
    text = content if closed else reasoning + content
    grade = grader.grade(planned.question, text)
    stray = any(tag in content for tag in STRAY_TAGS)
    setting, question, sample = planned.key
    return Sample(
        setting=setting,
        question=question,
        sample=sample,
        correct=grade.correct,
        said=grade.reading,
        tokens=usage["completion_tokens"],
        reasoning_tokens=reasoning_tokens,
        thought=closed or "</think>" in content,
        malformed=not unfinished and (grade.reading is None or stray),
        unfinished=unfinished,
        text=text,
    )
