"""Asynchronous scheduling gives every request what it gets step by step, to the token.

The workloads mix everything that a request may contain. Other tests check the steps one by one.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mi_runtime.config import EngineConfig, GrammarVocabulary, TokenMarks
from mi_runtime.embedded_pair.tokenizer import VOCABULARY_SIZE, build_tokenizer
from mi_runtime.engine import Engine
from mi_runtime.model.pair_modules import PairEmbedding
from mi_runtime.request import (
    Dial,
    EngineRequest,
    FinishReason,
    SamplingParams,
    ThinkPolicy,
    TokenEvent,
)
from tests.runtime.conftest import PairOf
from tests.runtime.shared_models import engine_of

Directories = tuple[Path, Path]
Build = Callable[..., Engine]
OPEN, CLOSE = 2, 3
ENDS = frozenset(range(4, 16))  # so many, that a random model comes to one
DIGITS = 'start: "{" /[0-9]{1,9}/ "}"'
THOUGHTS = [
    None,
    ThinkPolicy(OPEN, CLOSE),
    ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, close_aliases=frozenset(range(20, 40))),
    ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, cap=9, closing=(17, CLOSE, 18)),
    ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, cap=9, soft_window=6, forbid_eos=True),
]
MARKS = TokenMarks(soft_ends=frozenset(range(40, 90)))
FEW = 18  # blocks: some sequence is preempted
SETTINGS = {
    "roomy": {},
    "few blocks": {"num_blocks": FEW},
    "few blocks, no cache": {"num_blocks": FEW, "prefix_caching": False},
    "few tokens a step": {"max_batched_tokens": 7, "num_blocks": 30},
}


@pytest.fixture(scope="module")
def build(pair_of: PairOf, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Returns a function that builds engines with grammars and these settings."""
    directories = pair_of("qwen3", vocab_size=VOCABULARY_SIZE)
    tokenizer = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    build_tokenizer().save(str(tokenizer))
    small: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "num_blocks": 200,
        "block_size": 4,
        "max_model_len": 64,
        "marks": MARKS,
        "grammar_vocabulary": GrammarVocabulary(str(tokenizer), (0,)),
    }

    def make(**settings: Any) -> Engine:
        return engine_of(EngineConfig(*map(str, directories), **small | settings))

    return make


def requests(seed: int, count: int = 14) -> list[EngineRequest]:
    """Returns requests whose prompts begin as one of two texts, so that some share a prefix."""
    rng = random.Random(seed)
    texts = [rng.choices(range(90, VOCABULARY_SIZE), k=30) for _ in range(2)]
    return [random_request(rng, f"r{index}", rng.choice(texts)) for index in range(count)]


def random_request(rng: random.Random, name: str, text: list[int]) -> EngineRequest:
    sampling = SamplingParams(
        max_tokens=rng.choice([0, 1, 2, 12, 25, 25, None]),
        min_tokens=rng.choice([0, 0, 5]),
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        top_k=rng.choice([0, 0, 50]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
        logit_bias=rng.choice([(), (), ((100, 2.0),)]),
        seed=rng.randrange(100),
        eos_token_ids=ENDS,
        logprobs=rng.choice([None, 2]),
        prompt_logprobs=rng.choice([None, None, 1]),
    )
    return EngineRequest(
        name,
        tuple(text[: rng.randint(1, len(text))]),
        Dial(rng.choice([0.0, 0.3, 0.3, 1.0])),
        sampling,
        rng.choice(THOUGHTS),
        answer_dial=rng.choice([None, None, Dial(0.6)]),
        priority=rng.choice([0, 0, 1]),
        grammar=rng.choice([None, None, None, DIGITS]),
    )


Outcome = tuple[list[int | None], FinishReason | None, int, bool]


def outcome(events: list[TokenEvent]) -> Outcome:
    """Returns tokens, finish reason, reasoning tokens, and whether the block was forced closed."""
    last = events[-1]
    tokens = [event.token_id for event in events]
    return tokens, last.finish_reason, last.reasoning_tokens, last.forced_close


def logprobs_of(events: list[TokenEvent]) -> list[float]:
    """Returns the log-probabilities of prompt and answer, which rounding may change."""
    prompt = [one for event in events for one in event.prompt_logprobs or ()]
    own = [event.logprobs for event in events if event.logprobs is not None]
    return [value for one in prompt + own for value in (one.token, *dict(one.top).values())]


def run(
    engine: Engine, coming: list[EngineRequest], rng: random.Random, aborts: float = 0.0
) -> dict[str, list[TokenEvent]]:
    """Runs all requests, submitting one, and at times aborting one, between steps."""
    events: dict[str, list[TokenEvent]] = {}
    waiting = list(coming)
    while waiting or not engine.idle:
        if waiting and rng.random() < 0.5:
            events[waiting[0].request_id] = []
            engine.submit(waiting.pop(0))
        found = engine.step()
        if events and rng.random() < aborts:
            aborted = engine.abort(rng.choice(list(events)))
            found += [aborted] if aborted is not None else []
        engine.scheduler.check_integrity()
        for event in found:
            mine = events[event.request_id]
            assert not mine or mine[-1].finish_reason is None, "an event after the terminal one"
            mine.append(event)
    assert engine.stats().used_blocks == 0
    return events


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]
)
def test_a_mixed_workload_gets_the_same_tokens_as_step_by_step(
    seed: int, settings: dict[str, Any], build: Build
) -> None:
    coming = requests(seed)
    plain, ahead = (build(**settings, async_scheduling=value) for value in (False, True))
    expected = run(plain, coming, random.Random(seed))
    found = run(ahead, coming, random.Random(seed))
    for one in coming:
        name = one.request_id
        assert outcome(found[name]) == outcome(expected[name]), one
        assert logprobs_of(found[name]) == pytest.approx(logprobs_of(expected[name]), abs=1e-4)
    assert len({outcome(events)[1] for events in found.values()}) >= 3
    if settings.get("num_blocks") == FEW:
        assert plain.stats().preemptions
        assert ahead.stats().preemptions


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))]
)
def test_an_aborted_request_gets_a_prefix_of_its_answer_and_the_others_all_of_theirs(
    seed: int, build: Build
) -> None:
    coming = requests(seed + 100)
    expected = run(build(async_scheduling=False), coming, random.Random(seed))
    engine = build(num_blocks=FEW, async_scheduling=True)
    found = run(engine, coming, random.Random(seed), aborts=0.1)
    reasons = {events[-1].finish_reason for events in found.values()}
    for name, events in found.items():
        if events[-1].finish_reason is FinishReason.ABORT:
            tokens = outcome(events)[0][:-1]
            assert tokens == outcome(expected[name])[0][: len(tokens)]
        else:
            assert outcome(events) == outcome(expected[name])
    assert {FinishReason.ABORT} < reasons


def test_a_request_that_fails_in_flight_fails_alone(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step is launched before the failure of this one is noticed."""
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    coming = [
        EngineRequest(f"r{index}", (100 + index, 200), Dial(0.3), greedy) for index in range(3)
    ]
    expected = run(build(), coming, random.Random(0))
    alone = {name: outcome(events)[0] for name, events in expected.items()}
    others = [*alone["r0"], *alone["r2"], *(token for one in coming for token in one.prompt)]
    broken = next(token for token in alone["r1"] if token not in others)
    right = PairEmbedding.forward

    def forward(self: PairEmbedding, input: torch.Tensor) -> torch.Tensor:
        return right(self, input).masked_fill((input == broken).unsqueeze(-1), torch.nan)

    monkeypatch.setattr(PairEmbedding, "forward", forward)
    found = run(build(async_scheduling=True), coming, random.Random(0))
    assert outcome(found["r0"])[0] == alone["r0"]
    assert outcome(found["r2"])[0] == alone["r2"]
    tokens, reason, *_ = outcome(found["r1"])
    assert reason is FinishReason.ERROR
    assert tokens == [*alone["r1"][: alone["r1"].index(broken) + 1], None]


def test_a_step_is_launched_before_the_previous_one_is_read(build: Build) -> None:
    engine, order = build(async_scheduling=True), list[str]()
    launch, update = engine._runner.launch, engine.scheduler.update

    def launching(*args: Any) -> Any:
        order.append("launch")
        return launch(*args)

    def updating(*args: Any) -> Any:
        order.append("update")
        return update(*args)

    engine._runner.launch = launching  # type: ignore[method-assign]
    engine.scheduler.update = updating  # type: ignore[method-assign]
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    events = engine.generate([EngineRequest("r", (100, 101), Dial(0.3), sampling)])["r"]
    assert len(events) == 4
    assert order == ["launch", *(["launch", "update"] * 3), "update"]


def test_asynchronous_scheduling_is_off_on_a_cpu_by_default(build: Build) -> None:
    assert not build()._asynchronous
    assert build(async_scheduling=True)._asynchronous
