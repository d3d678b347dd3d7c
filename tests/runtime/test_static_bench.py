"""The static engine, the baseline of the benches, answers as the checkpoint does."""

from pathlib import Path

from bench.models.static_engine import StaticEngine
from mi_runtime.config import EngineConfig
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from tests.runtime import oracle


def test_the_static_engine_answers_as_the_checkpoint_does(qwen3_pair: tuple[Path, Path]) -> None:
    config = EngineConfig(*map(str, qwen3_pair), device="cpu", dtype="float32")
    engine = StaticEngine(qwen3_pair[0], config)
    prompt = [5, 6, 7, 8]
    sampling = SamplingParams(max_tokens=6, temperature=0.0)
    events = engine.generate([EngineRequest("r", tuple(prompt), Dial(0.0), sampling)])["r"]
    expected = oracle.greedy(oracle.endpoint(qwen3_pair[0]), prompt, 6)
    assert [event.token_id for event in events] == expected
