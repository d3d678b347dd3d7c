"""Log-probabilities of the prompt are those of plain `transformers` on a merged checkpoint."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mi_runtime.engine import Engine
from mi_runtime.execution import logprobs
from mi_runtime.execution.logprobs import RowLogprobs, read_logprobs, token_logprobs
from mi_runtime.request import (
    Dial,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from mi_runtime.scheduling import scheduler
from tests.runtime import oracle
from tests.runtime.engine_runs import run_to_end
from tests.runtime.families import VOCABULARY

MakeEngine = Callable[..., Engine]
LAMBDAS = (0.0, 0.3, 0.7, 1.0, 0.3)
TOP = 3


def request(index: int, prompt: tuple[int, ...], value: float, **params: Any) -> EngineRequest:
    sampling = SamplingParams(temperature=0, **{"prompt_logprobs": TOP, **params})
    return EngineRequest(f"r{index}", prompt, Dial(value), sampling)


def prompts() -> list[tuple[int, ...]]:
    """Returns prompts of several lengths, one of a single token, two with a common prefix."""
    rng = random.Random(0)
    own = [tuple(rng.choices(range(3, VOCABULARY), k=k)) for k in (23, 17, 9, 1, 5)]
    return [*own[:4], own[1][:12] + own[4]]


def assert_equals_oracle(
    scores: tuple[TokenLogprobs, ...] | None, model: Any, one: EngineRequest
) -> None:
    assert scores is not None
    assert len(scores) == len(one.prompt) - 1
    table = oracle.logits(model, list(one.prompt)).log_softmax(1)
    for row, (token, found) in enumerate(zip(one.prompt[1:], scores, strict=True)):
        best = table[row].topk(TOP)
        assert found.token == pytest.approx(table[row, token].item(), abs=2e-4)
        assert [index for index, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=2e-4)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batched_tokens": 3}, {"num_blocks": 12, "max_batched_tokens": 7}],
    ids=["at once", "in chunks", "with preemption"],
)
def test_prompts_at_mixed_lambdas_in_one_batch_have_the_oracles_log_probabilities(
    settings: dict[str, Any], make_engine: MakeEngine, qwen3_pair: tuple[Path, Path]
) -> None:
    engine = make_engine(**settings)
    wanted = [
        request(index, prompt, value, max_tokens=tokens)
        for index, (prompt, value, tokens) in enumerate(
            zip(prompts(), LAMBDAS, (0, 20, 0, 20, 1), strict=True)
        )
    ]
    events = run_to_end(engine, *wanted)
    for one in wanted:
        first, *others = events[one.request_id]
        model = oracle.merged(*qwen3_pair, one.dial.reasoning_lambda)
        assert_equals_oracle(first.prompt_logprobs, model, one)
        assert all(event.prompt_logprobs is None for event in others)
        assert (first.token_id is None) == (one.sampling.max_tokens == 0)
        assert (others or [first])[-1].finish_reason is FinishReason.LENGTH
    assert (engine.stats().preemptions > 0) == ("num_blocks" in settings)


def test_a_long_prompt_is_scored_in_several_steps(
    make_engine: MakeEngine, qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "SCORED_ROWS", 4)
    engine = make_engine()
    one = request(0, prompts()[0], 0.3, max_tokens=0)
    events = run_to_end(engine, one)
    assert engine.stats().steps == 6  # 22 rows
    assert_equals_oracle(events["r0"][0].prompt_logprobs, oracle.merged(*qwen3_pair, 0.3), one)


def test_scoring_a_prompt_does_not_change_its_answer(make_engine: MakeEngine) -> None:
    plain, scored = (
        run_to_end(
            make_engine(), request(0, prompts()[0], 0.3, max_tokens=9, prompt_logprobs=count)
        )
        for count in (None, 0)
    )
    tokens = [[event.token_id for event in events["r0"]] for events in (plain, scored)]
    assert tokens[0] == tokens[1]
    assert scored["r0"][0].prompt_logprobs is not None
    assert all(score.top == () for score in scored["r0"][0].prompt_logprobs)


def test_a_prompt_whose_logits_are_not_finite_fails_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batched_tokens=8)
    score = engine._runner._score

    def broken(logits: torch.Tensor, batch: Any, scores: Any) -> torch.Tensor:
        """Makes the first scored row of the first request infinite."""
        if batch.scored[0].sequence.request_id == "r0":
            logits = logits.clone()
            logits[0, 0] = torch.inf
        return score(logits, batch, scores)

    engine._runner._score = broken  # type: ignore[method-assign]
    events = run_to_end(
        engine, *(request(index, prompts()[index], 0.3, max_tokens=2) for index in range(2))
    )
    (failed,) = events["r0"]
    assert (failed.finish_reason, failed.prompt_logprobs) == (FinishReason.ERROR, None)
    assert [event.finish_reason for event in events["r1"]] == [None, FinishReason.LENGTH]


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_slices_of_rows_give_the_same_log_probabilities(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    at_once = read(token_logprobs(logits, tokens, count))
    monkeypatch.setattr(logprobs, "SLICE", 2)
    assert read(token_logprobs(logits, tokens, count)) == at_once
    assert {len(one.top) for one in at_once} == {min(count, 11)}
    table = logits.log_softmax(1)
    assert [one.token for one in at_once] == [table[i, t].item() for i, t in enumerate(tokens)]


def read(found: RowLogprobs) -> list[TokenLogprobs]:
    return read_logprobs(iter(found.tensors))
