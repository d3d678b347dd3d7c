"""A pair of models in memory is served as a pair of files is."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils

from bench.models.static_engine import static_model
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.errors import PairError
from mi_runtime.model.load import load_pair, pair_up
from mi_runtime.model.pair_check import check_pair
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from tests.runtime import oracle
from tests.runtime.conftest import MakeEngine, PairOf

SMALL = EngineConfig("", "", num_blocks=64, block_size=4)
PROMPT = (5, 6, 7, 8, 9)


def in_memory(directory: Path) -> PreTrainedModel:
    """Returns a model as `transformers` makes it, with its own attention, in training mode."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(model, PreTrainedModel)
    return model.train()


def answers(engine: Engine, *values: float) -> list[list[int | None]]:
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    requests = [EngineRequest(str(value), PROMPT, Dial(value), greedy) for value in values]
    return [[event.token_id for event in own] for own in engine.generate(requests).values()]


def test_a_pair_in_memory_gives_the_answers_of_the_same_pair_from_files(
    qwen3_pair: tuple[Path, Path], make_engine: MakeEngine
) -> None:
    instruct, thinking = map(in_memory, qwen3_pair)
    engine = Engine(SMALL, pair_up(instruct, thinking, "of two models"))
    values = (0.0, 0.3, 0.8, 1.0)
    assert answers(engine, *values) == answers(make_engine(), *values)
    assert engine.info.pair_identity == "of two models"
    assert engine.info.weight_bytes == make_engine().info.weight_bytes
    assert not list(thinking.parameters()), "a third copy would be held"


def test_a_pair_in_memory_that_cannot_be_served_is_refused_by_name(pair_of: PairOf) -> None:
    instruct, thinking = map(in_memory, pair_of("qwen3"))
    instruct.extra = instruct.lm_head.__class__(4, 4)  # which no forward uses
    thinking.extra = thinking.lm_head.__class__(4, 4)
    with pytest.raises(PairError, match="extra"):
        pair_up(instruct, thinking, "")


def test_the_memory_of_an_endpoint_is_allocated_tensor_by_tensor(
    qwen3_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single large allocation could not be freed in parts. transformers makes one by default."""
    warmed_up: list[object] = []
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *_: warmed_up.append(_))
    load_pair(check_pair(*map(str, qwen3_pair)), "cpu")
    assert not warmed_up
    AutoModelForCausalLM.from_pretrained(qwen3_pair[0], device_map={"": "cpu"})
    assert warmed_up, "the loader has another name for it"


def test_a_plain_model_in_memory_is_served_without_blending(qwen3_pair: tuple[Path, Path]) -> None:
    engine = Engine(replace(SMALL, blend_policy="pair"), static_model(in_memory(qwen3_pair[0])))
    expected = oracle.greedy(oracle.endpoint(qwen3_pair[0]), list(PROMPT), 6)
    assert answers(engine, 0.9) == [expected]
    stats = engine.stats()
    assert not stats.endpoint_executions + stats.blended_executions + stats.pair_executions
