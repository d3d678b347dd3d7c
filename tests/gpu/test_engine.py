"""The engine gives the same tokens on a GPU as on a CPU, with the embedded pair in fp32.

A token may differ if the reference's two best are closer together than rounding on another device
moves them. The rest of that answer is then another text, and is not compared.

The most important tests come first, and each engine is as small as possible: decode steps are
captured for few rows, and compiled only in the longest test. The attention backend and the kernels
of pair products are those of a real model, even if others would be faster at this size.
"""

import gc
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from bench.models.workloads import EMBEDDED_PAIR, prompts
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.errors import PairError
from mi_runtime.request import Dial, EngineRequest, SamplingParams, TokenEvent
from tests.gpu.conftest import DEVICE, REHEARSED, on_a_gpu_only

Answers = dict[str, list[TokenEvent]]
Make = Callable[..., Engine]

LAMBDAS = (0.0, 0.25, 0.5, 0.5, 0.5, 0.75, 0.9, 1.0)
NEW_TOKENS = 6 if REHEARSED else 24
SMALL: dict[str, Any] = {
    "num_blocks": 128,
    "max_num_seqs": 8,  # so that few CUDA graphs are captured
    "max_model_len": 256,
    "max_batched_tokens": 64,  # so that prompts are computed in several chunks
    "blend_cache_bytes": 16 << 20 if REHEARSED else None,  # room for three λ, or as many as can be
    "attention_backend": "reference" if REHEARSED else "triton",  # slow if interpreted
    "torch_compile": False,
}
TIE = 1e-3  # of log-probabilities: nearer ones may change places in fp32
TOLERANCE = 1e-3  # of the log-probability of a token, in fp32
KERNEL_ROWS = 256


@pytest.fixture(autouse=True, scope="module")
def _kernels_for_all_rows() -> Iterator[None]:
    """Enables kernels up to `KERNEL_ROWS` rows, without measuring where they are faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mi_runtime.execution.cost_measurement.best_row_limit", lambda *_: KERNEL_ROWS
        )
        yield


def requests(values: tuple[float, ...] = LAMBDAS, **sampling: Any) -> list[EngineRequest]:
    """Returns requests of several lengths, so that blocks end anywhere."""
    params = SamplingParams(
        **{"max_tokens": NEW_TOKENS, "temperature": 0.0, "logprobs": 2, **sampling}
    )
    return [
        EngineRequest(f"{index}", tuple(prompt[: 30 - 3 * index]), Dial(value), params)
        for index, (prompt, value) in enumerate(
            zip(prompts(EMBEDDED_PAIR, seed=3, count=len(values)), values, strict=True)
        )
    ]


def build(device: str, **settings: Any) -> Engine:
    config = {"device": device, "dtype": "float32", **SMALL, **settings}
    return Engine(EngineConfig(EMBEDDED_PAIR.instruct, EMBEDDED_PAIR.thinking, **config))


@cache
def reference(values: tuple[float, ...] = LAMBDAS, delta_dtype: Any = "none") -> Answers:
    """Returns the answers of a CPU, with the plainest configuration."""
    plain = {"blend_policy": "pair", "attention_backend": "reference"}
    engine = build("cpu", **plain, delta_dtype=delta_dtype)
    return engine.generate(requests(values))


def assert_as_on_a_server(engine: Engine, how: str = "captured") -> None:
    """Asserts that decode steps are captured and pair products use kernels."""
    if not REHEARSED:
        assert f" {how}, in " in engine.info.graphs, engine.info.graphs
        assert engine.info.pair_kernels == f"up to {KERNEL_ROWS} rows"


@pytest.fixture(scope="module")
def engine(_on_a_gpu: None, _kernels_for_all_rows: None) -> Engine:
    """Returns an engine like a server's, but small, and without compiled steps."""
    engine = build(DEVICE)
    assert_as_on_a_server(engine)
    assert engine._groups.cache.places >= 3, "blended weights would not be replayed at several λ"
    return engine


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes engines on the GPU, and frees their memory after the test."""
    yield lambda **settings: build(DEVICE, **settings)
    gc.collect()
    if not REHEARSED:
        torch.cuda.empty_cache()


def assert_agree(found: Answers, expected: Answers) -> None:
    compared = 0
    for name, own in expected.items():
        for one, other in zip(found[name], own, strict=True):
            assert one.error is None
            assert one.logprobs is not None
            assert other.logprobs is not None
            (_, best), (_, second) = other.logprobs.top
            if one.token_id != other.token_id:
                assert best - second < TIE, f"{name}: {one} is not {other}"
                break
            assert one.logprobs.token == pytest.approx(other.logprobs.token, abs=TOLERANCE)
            compared += 1
    assert compared > 0.9 * sum(map(len, expected.values())), "too many answers ended at a tie"


def test_eager_steps_give_the_cpus_answers(make: Make) -> None:
    engine = make(cuda_graphs=False)
    assert engine.info.graphs == "none"
    assert_agree(engine.generate(requests()), reference())


def test_cuda_graphs_give_the_cpus_answers(engine: Engine) -> None:
    assert_agree(engine.generate(requests()), reference())
    assert_agree(engine.generate(requests()), reference())  # found in the prefix cache


@on_a_gpu_only
def test_compiled_steps_give_the_cpus_answers(make: Make) -> None:
    """The longest test runs early, so that other processes run the others meanwhile."""
    engine = make(torch_compile=True)
    assert_as_on_a_server(engine, "captured and compiled")
    assert_agree(engine.generate(requests()), reference())


@pytest.mark.parametrize("value", [0.4, 0.0, 1.0])
def test_one_λ_gives_the_cpus_answers(engine: Engine, value: float) -> None:
    values = (value,) * 4
    for _ in range(3):  # a new λ, and a hot one
        assert_agree(engine.generate(requests(values)), reference(values))


@pytest.mark.parametrize(
    "settings",
    [
        {"blend_policy": "pair"},
        {"blend_policy": "blended"},
        {"num_blocks": 16, "prefix_caching": False},  # so few that sequences are preempted
        {"async_scheduling": False},
        {"attention_backend": "reference"},
        {"attention_backend": "auto"},
    ],
    ids=str,
)
def test_every_setting_gives_the_cpus_answers(make: Make, settings: dict[str, Any]) -> None:
    engine = make(**settings)
    for _ in range(2):
        assert_agree(engine.generate(requests()), reference())
    engine.scheduler.check_integrity()
    if settings.get("num_blocks") and not REHEARSED:  # whose answers are short
        assert engine.stats().preemptions
    if settings.get("blend_policy") == "blended":
        assert engine.stats().blended_executions


@pytest.mark.parametrize("delta_dtype", ["int8", "int4"])
def test_deltas_give_the_cpus_answers(make: Make, delta_dtype: str) -> None:
    engine = make(delta_dtype=delta_dtype)
    assert_as_on_a_server(engine)
    for _ in range(2):
        assert_agree(engine.generate(requests()), reference(delta_dtype=delta_dtype))


@pytest.mark.parametrize("settings", [{}, {"delta_dtype": "int8"}], ids=str)
def test_in_bf16_the_log_probabilities_are_near_the_cpus(
    make: Make, settings: dict[str, Any]
) -> None:
    """Compares those of prompt tokens, since answers soon become different texts.

    Each of 6 layers rounds to 8 bits.
    """
    scoring = {"max_tokens": 1, "prompt_logprobs": 0}
    exact = build("cpu", **settings).generate(requests(**scoring))
    found = make(dtype="bfloat16", **settings).generate(requests(**scoring))
    errors = torch.tensor(
        [abs(one - other) for name in exact for one, other in zip(
            prompt_logprobs(found[name]), prompt_logprobs(exact[name]), strict=True
        )]
    )  # fmt: skip
    assert errors.median() < 0.03
    assert errors.quantile(0.95) < 0.3


def prompt_logprobs(events: list[TokenEvent]) -> list[float]:
    scores = events[0].prompt_logprobs
    assert scores is not None
    return [score.token for score in scores]


def test_requests_that_leave_do_not_disturb_the_others(engine: Engine) -> None:
    found: Answers = {}
    for request in requests():
        engine.submit(request)
        found[request.request_id] = []
    for step in range(500):
        if step in (2, 5, 9):
            assert engine.abort(f"{step // 2}") is not None
        for event in engine.step():
            found[event.request_id].append(event)
        engine.scheduler.check_integrity()
        if engine.idle:
            break
    assert engine.idle
    stay = {name: own for name, own in reference().items() if name not in ("1", "2", "4")}
    assert_agree({name: found[name] for name in stay}, stay)


def test_sampled_answers_do_not_depend_on_the_batch(engine: Engine) -> None:
    sampling = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "seed": 7}
    together = engine.generate(requests(**sampling))
    same = 0
    for request in requests(**sampling):
        (alone,) = engine.generate([request]).values()
        same += [one.token_id for one in alone] == [
            one.token_id for one in together[request.request_id]
        ]
    assert same >= len(LAMBDAS) - 1  # another batch rounds differently, which may change a draw


@on_a_gpu_only
def test_a_kv_cache_that_does_not_fit_is_refused_with_a_message(make: Make) -> None:
    free = torch.cuda.mem_get_info()[0]
    with pytest.raises(PairError, match=r"(?i)memory"):
        make(num_blocks=None, kv_cache_bytes=1000 * free, max_model_len=None)  # more than there is
    gc.collect()
    torch.cuda.empty_cache()
    with pytest.raises(PairError, match=r"no memory for KV: .* GiB .*--delta-dtype"):
        make(num_blocks=None, gpu_memory_utilization=0.001)
    assert_agree(make().generate(requests()), reference())
