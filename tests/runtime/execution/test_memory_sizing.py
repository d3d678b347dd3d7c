"""A GPU's memory is divided among caches, CUDA graphs and steps, or an error says what is missing.

The bytes are those of a device that does not exist; the largest steps run on the CPU.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.attention.plan import LayerShape
from mi_runtime.config import EngineConfig
from mi_runtime.engine import OUT_OF_MEMORY, Engine
from mi_runtime.errors import PairError
from mi_runtime.execution import memory_sizing
from mi_runtime.execution.memory_sizing import GIB, CacheSizes, ReservedMemory, cuda_sizes
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.request import Dial, EngineRequest, FinishReason, SamplingParams
from mi_runtime.scheduling.scheduler import SCORED_ROWS

MakeEngine = Callable[..., Engine]
CONFIG = EngineConfig("instruct", "thinking", max_model_len=32768)
RESERVED = ReservedMemory(
    total=80 * GIB,
    used=17 * GIB,
    workspace=2 * GIB,
    first_graph=1 * GIB,
    next_graph=16 * 2**20,
    num_graphs=36,
    graphs_per_place=12,
)
BLEND = 7 * GIB  # bytes of one λ's blended weights


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> BlendedModel:
    return qwen3_4b(monkeypatch)


def qwen3_4b(patch: pytest.MonkeyPatch) -> BlendedModel:
    """Returns a model of Qwen3-4B's shape, whose KV takes 2.25 MiB a block."""
    patch.setattr(memory_sizing, "blend_bytes", lambda _model: BLEND)
    layers = (LayerShape(8, 128, 128, 32),) * 36
    shape = SimpleNamespace(layers=layers, dtype=torch.bfloat16, max_positions=262_144)
    return cast(BlendedModel, shape)


def bytes_used(
    config: EngineConfig, model: BlendedModel, reserved: ReservedMemory, sizes: CacheSizes
) -> int:
    places = sizes.places * (BLEND + reserved.graph_bytes_per_place)
    kv = sizes.num_blocks * memory_sizing.block_bytes(config, model)
    return reserved.used + reserved.workspace + reserved.graph_bytes + places + kv


def test_blended_weights_get_a_quarter_of_the_free_memory_and_kv_the_rest(
    model: BlendedModel,
) -> None:
    sizes = cuda_sizes(CONFIG, model, RESERVED)
    assert memory_sizing.block_bytes(CONFIG, model) == 16 * 36 * 8 * 256 * 2
    assert sizes.places == 1
    spare = 72 * GIB - bytes_used(CONFIG, model, RESERVED, sizes)
    assert 0 <= spare < memory_sizing.block_bytes(CONFIG, model)


def test_kv_gets_no_more_than_full_sequences_can_use(model: BlendedModel) -> None:
    config = replace(CONFIG, max_model_len=1000, max_num_seqs=4)
    assert cuda_sizes(config, model, RESERVED).num_blocks == 4 * 63


def test_configured_sizes_are_used(model: BlendedModel) -> None:
    sizes = cuda_sizes(replace(CONFIG, num_blocks=9, blend_cache_bytes=0), model, RESERVED)
    assert sizes == CacheSizes(num_blocks=9, places=0)
    by_bytes = replace(CONFIG, kv_cache_bytes=10 * GIB, blend_cache_bytes=44 * GIB)
    sizes = cuda_sizes(by_bytes, model, RESERVED)
    assert sizes.places == 6
    assert sizes.num_blocks == 10 * GIB // memory_sizing.block_bytes(CONFIG, model)


def test_blended_weights_get_no_memory_if_they_cannot_be_used(
    model: BlendedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuda_sizes(replace(CONFIG, blend_policy="pair"), model, RESERVED).places == 0
    monkeypatch.setattr(memory_sizing, "blend_bytes", lambda _model: 0)  # a plain model
    for configured in (None, 44 * GIB):
        assert (
            cuda_sizes(replace(CONFIG, blend_cache_bytes=configured), model, RESERVED).places == 0
        )


def test_graphs_after_the_first_are_counted_as_large_as_the_second() -> None:
    assert RESERVED.graph_bytes == GIB + 35 * 16 * 2**20
    assert RESERVED.graph_bytes_per_place == 12 * 16 * 2**20


def test_too_little_memory_is_an_error_with_numbers_and_flags_to_change(
    model: BlendedModel,
) -> None:
    with pytest.raises(PairError) as caught:
        cuda_sizes(CONFIG, model, replace(RESERVED, used=71 * GIB))
    message = str(caught.value)
    assert "of 80.0 GiB on the device, --gpu-memory-utilization 0.9 allows 72.0 GiB" in message
    assert "hold 71.0 GiB, the largest step takes 2.0 GiB" in message
    assert " GiB too little." in message
    assert "-" not in message.partition("takes")[2].partition(" too little")[0]
    for flag in ("--delta-dtype", "--max-batched-tokens", "--max-num-seqs"):
        assert flag in message


def test_a_kv_cache_of_less_than_a_block_is_an_error_that_names_its_flag(
    model: BlendedModel,
) -> None:
    with pytest.raises(PairError, match="--kv-cache-bytes 1 is less than one KV block"):
        cuda_sizes(replace(CONFIG, kv_cache_bytes=1), model, RESERVED)


@given(
    used=st.integers(0, 80 * GIB),
    workspace=st.integers(0, 8 * GIB),
    utilization=st.floats(0.05, 1.0),
)
def test_the_caches_never_exceed_the_allowed_memory(
    used: int, workspace: int, utilization: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shape = qwen3_4b(patch)
        reserved = replace(RESERVED, used=used, workspace=workspace)
        config = replace(CONFIG, gpu_memory_utilization=utilization)
        try:
            sizes = cuda_sizes(config, shape, reserved)
        except PairError:
            least = 2 * memory_sizing.block_bytes(config, shape)
            assert used + workspace + reserved.graph_bytes > RESERVED.total * utilization - least
            return
        assert sizes.num_blocks >= 1
        assert bytes_used(config, shape, reserved, sizes) <= RESERVED.total * utilization


def test_steps_of_all_sizes_run_at_start_by_both_kinds_of_product() -> None:
    """The first long prompt at λ = 0 once compiled six kernels while all streams waited."""
    steps = memory_sizing.steps_of_all_sizes(EngineConfig("", "", max_batched_tokens=2048))
    ran = {(chunk.dial, chunk.length) for (chunk,) in steps}
    assert ran == {(Dial(value), 2**power) for value in (0.0, 0.5) for power in range(12)}


def test_the_largest_steps_can_be_computed_and_sampled(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batched_tokens=40, max_num_seqs=5)
    runner, config = engine._runner, EngineConfig("", "", block_size=4, max_batched_tokens=40)
    kept: list[int] = []
    for chunks in memory_sizing.largest_steps(
        replace(config, max_num_seqs=5), engine.info.vocab_size
    ):
        assert sum(chunk.length for chunk in chunks) in (40, 5)
        kept.append(sum(len(chunk.scored) + chunk.samples for chunk in chunks))
        for chunk in chunks:
            assert max(chunk.sequence.block_table) < memory_sizing.blocks_of_largest_step(config)
        step = runner.launch(chunks)
        runner.sample(step)
        results = step.results()
        assert len(results.sampled) == len(chunks)
        assert None not in results.sampled.values()
    assert kept == [1, 40, 5, 5]


def test_no_more_prompt_positions_are_scored_than_a_step_may_have() -> None:
    """For longer prefills, four times these logits were measured and taken from the KV cache."""
    config = EngineConfig("", "", max_batched_tokens=4 * SCORED_ROWS)
    _, (scored,), *_ = memory_sizing.largest_steps(config, vocab_size=100)
    assert len(scored.scored) + scored.samples == SCORED_ROWS


# --- A step that runs out of memory ---------------------------------------------------------------

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("what", ["launch", "sample"])
def test_a_step_without_memory_ends_its_requests_and_no_others(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, what: str, asynchronous: bool
) -> None:
    engine = make_engine(async_scheduling=asynchronous)
    requests = [EngineRequest(name, (5, 6, 7), Dial(0.5), GREEDY) for name in ("a", "b")]
    expected = engine.generate(requests[:1])["a"]
    calls = 0
    original = getattr(engine._runner, what)

    def third_fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(engine._runner, what, third_fails)
    events = engine.generate(requests)
    for own in events.values():
        assert [event.finish_reason for event in own if event.finish_reason] == [FinishReason.ERROR]
        assert own[-1].error == OUT_OF_MEMORY
    engine.scheduler.check_integrity()
    assert engine.scheduler.blocks.referenced == 0
    again = engine.generate(requests[:1])["a"]
    assert [event.token_id for event in again] == [event.token_id for event in expected]
