"""The quickest attention backend that agrees with the reference is chosen, and answers agree."""

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_runtime.attention import selector
from mi_runtime.attention.plan import AttentionPlan, LayerShape
from mi_runtime.attention.reference import ReferenceAttention
from mi_runtime.attention.selector import (
    AttentionChoice,
    AttentionWorkload,
    choose_attention,
    fastest,
    measured_workloads,
    obstacle,
)
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.errors import PairError
from mi_runtime.kernels.triton_support import cause_of, triton_installed
from mi_runtime.request import Dial, EngineRequest, SamplingParams

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYER = LayerShape(kv_heads=2, key_dim=16, value_dim=16, heads=4)
needs_triton = pytest.mark.skipif(not triton_installed(), reason="triton is not installed")


class TimedBackend(ReferenceAttention):
    """The reference under another name, which advances `now` by its time for each layer."""

    now = 0.0

    def __init__(self, name: str, takes: float, wrong: float = 0.0, error: str = "") -> None:
        super().__init__()
        self.name = name
        self._takes, self._wrong, self._error = takes, wrong, error

    def attend(self, plan: AttentionPlan, *args: Any, **kwargs: Any) -> Tensor:
        if self._error:
            raise RuntimeError(self._error)
        TimedBackend.now += self._takes
        return super().attend(plan, *args, **kwargs) + self._wrong


def clock(work: Callable[[], object]) -> float:
    """Returns the time that `TimedBackend` says this work takes."""
    started = TimedBackend.now
    work()
    return TimedBackend.now - started


def workloads(*layers: LayerShape, dtype: torch.dtype = torch.float32) -> list[AttentionWorkload]:
    return list(measured_workloads(layers, dtype, CPU, block_size=4, decodes=3, tokens=21))


def choice(*others: TimedBackend) -> AttentionChoice:
    return fastest([TimedBackend("reference", 3.0), *others], workloads(LAYER), clock)


def test_the_quickest_backend_is_chosen_and_all_times_are_reported() -> None:
    chosen = choice(TimedBackend("a", 1.0), TimedBackend("b", 2.0))
    assert chosen.backend.name == "a"
    # 32 decode steps and one chunk
    assert chosen.description.startswith("a (")
    assert "reference 99 ms, a 33 ms, b 66 ms" in chosen.description


@pytest.mark.parametrize("wrong", [0.1, torch.nan])
def test_a_backend_that_disagrees_with_the_reference_is_not_used(wrong: float) -> None:
    chosen = choice(TimedBackend("a", 1.0, wrong))
    assert chosen.backend.name == "reference"
    assert "a disabled: its output differs from the reference" in chosen.description


def test_a_backend_that_does_not_run_is_reported_with_the_reason() -> None:
    chosen = choice(TimedBackend("a", 1.0, error="needs FA3\nat such a line"))
    assert chosen.backend.name == "reference"
    assert "a failed (needs FA3)" in chosen.description


def test_a_backend_that_breaks_the_gpu_is_named_in_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After an illegal access, no other backend can run either."""
    monkeypatch.setattr(selector, "is_lost", lambda device: True)
    with pytest.raises(PairError, match=r"a failed \(an illegal access.*again"):
        choice(TimedBackend("a", 1.0, error="an illegal access"), TimedBackend("b", 1.0))


def test_a_reference_that_does_not_run_is_an_error_with_a_flag_to_set() -> None:
    with pytest.raises(PairError, match=r"No plan.*--attention-backend"):
        fastest(
            [TimedBackend("reference", 1.0, error="No plan supports this")], workloads(LAYER), clock
        )


def test_running_out_of_memory_does_not_exclude_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(self: TimedBackend, *args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    other = TimedBackend("a", 1.0)
    monkeypatch.setattr(other, "attend", run_out.__get__(other))
    with pytest.raises(torch.OutOfMemoryError):
        choice(other)


@needs_triton
def test_the_report_of_a_compile_error_is_its_reason_without_its_place() -> None:
    from triton.compiler.errors import CompilationError

    inner = CompilationError("def f():\n    x", ast.Pass(), "K must be at least 16\nfor this")
    outer = CompilationError("def g():\n    f()", ast.Pass(), None)
    outer.__cause__ = inner
    assert cause_of(outer) == "K must be at least 16"
    assert cause_of(RuntimeError()) == "RuntimeError"


def test_a_layer_shape_is_weighted_by_the_number_of_its_layers() -> None:
    windowed = replace(LAYER, window=8)
    works = workloads(LAYER, windowed, windowed)
    assert [(work.window, work.plan.longest_query, work.weight) for work in works] == [
        (None, 1, 32),
        (None, 21, 1),
        (8, 1, 64),
        (8, 21, 2),
    ]


@needs_triton
def test_the_measured_workloads_give_the_same_on_every_backend() -> None:
    from mi_runtime.attention.triton_backend import TritonAttention

    for work in workloads(replace(LAYER, value_dim=12, window=8, sinks=True)):
        torch.testing.assert_close(
            work.run(TritonAttention()), work.run(ReferenceAttention()), atol=3e-6, rtol=1e-5
        )


def test_on_a_cpu_the_reference_is_used_without_measuring() -> None:
    chosen = choose_attention("auto", [LAYER], torch.float32, CPU, 16)
    assert (chosen.backend.name, chosen.description) == ("reference", "reference")


@pytest.mark.parametrize("wanted", ["triton", "torch"])
def test_a_backend_that_needs_a_gpu_is_refused_without_one(
    wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(selector, "triton_installed", lambda: True)
    with pytest.raises(PairError, match=f"--attention-backend {wanted}: it requires a CUDA device"):
        choose_attention(wanted, [LAYER], torch.float32, CPU, 16)


def test_a_backend_whose_library_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "triton_installed", lambda: False)
    with pytest.raises(PairError, match="--attention-backend triton: triton is not installed"):
        choose_attention("triton", [LAYER], torch.float32, CPU, 16)
    assert choose_attention("reference", [LAYER], torch.float32, CPU, 16).description == "reference"


@needs_triton
@pytest.mark.parametrize(
    ("layer", "dtype", "pages", "obstacle_text"),
    [
        (LAYER, torch.bfloat16, True, None),
        (LAYER, torch.bfloat16, False, "no attention over block tables"),
        (LAYER, torch.float32, True, "16 bits"),
        (replace(LAYER, sinks=True), torch.bfloat16, True, "sinks"),
        (replace(LAYER, value_dim=12), torch.bfloat16, True, "differ in size"),
        (replace(LAYER, key_dim=300), torch.bfloat16, True, "more than 256"),
    ],
)
def test_layers_that_torch_cannot_attend_are_excluded_with_a_reason(
    layer: LayerShape,
    dtype: torch.dtype,
    pages: bool,
    obstacle_text: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mi_runtime.attention.torch_backend.torch_has_pages", lambda: pages)
    reason = obstacle("torch", [LAYER, layer], dtype, CUDA)
    assert (reason is None) == (obstacle_text is None)
    assert obstacle_text is None or obstacle_text in str(reason)


@needs_triton
def test_torch_attention_is_called_with_the_lengths_and_windows_of_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The window of torch does not count the token itself."""
    from mi_runtime.attention import torch_backend

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return torch.zeros_like(args[0])

    monkeypatch.setattr(torch_backend, "varlen_attn", varlen_attn)
    for work in workloads(LAYER, replace(LAYER, window=8)):
        out = work.run(torch_backend.TorchAttention())
        assert out.shape == work.query.shape
    windows = [named["window_size"] for _, named in calls]
    assert windows == [(-1, 0), (-1, 0), (7, 0), (7, 0)]
    (_, _, _, starts, none, longest_query, longest), named = calls[1]
    assert (starts.tolist(), none, longest_query, longest) == ([0, 21], None, 21, 42)
    assert named["seqused_k"].tolist() == [42]
    assert (named["block_table"].dtype, named["enable_gqa"]) == (torch.int32, True)


@needs_triton
def test_an_engine_answers_the_same_with_interpreted_kernels(
    pair_of: Callable[..., tuple[Path, Path]],
) -> None:
    """The run has chunked prefills with decodes, a cached prefix, windows and sinks."""
    instruct, thinking = map(str, pair_of("gpt_oss"))

    def answers(backend: Any) -> dict[str, list[int | None]]:
        engine = Engine(
            EngineConfig(
                instruct,
                thinking,
                device="cpu",
                dtype="float32",
                num_blocks=32,
                block_size=4,
                max_batched_tokens=16,
                attention_backend=backend,
            )
        )
        assert engine.info.attention == backend
        prompt = tuple(range(3, 24))
        requests = [
            EngineRequest(name, tokens, Dial(value), SamplingParams(max_tokens=4, temperature=0.0))
            for name, tokens, value in (
                ("long", prompt, 0.5),
                ("short", (5, 6), 0.3),
                ("again", (*prompt[:10], 9), 0.5),
            )
        ]
        events = engine.generate(requests)
        return {name: [event.token_id for event in own] for name, own in events.items()}

    assert answers("triton") == answers("reference")


@needs_triton
def test_an_attention_layer_compiles_as_one_graph() -> None:
    from mi_runtime.attention.triton_backend import TritonAttention

    work = workloads(replace(LAYER, sinks=True))[0]
    backend = TritonAttention()

    def layer(query: Tensor, key: Tensor, value: Tensor, plan_slots: Tensor) -> Tensor:
        plan = work.plan
        backend.write(replace(plan, slot_mapping=plan_slots), work.keys, work.values, key, value)
        return backend.attend(
            plan, 2 * query, work.keys, work.values, scale=0.3, window=None, sinks=work.sinks
        )

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    arguments = (work.query, work.key, work.value, work.plan.slot_mapping)
    torch.testing.assert_close(compiled(*arguments), layer(*arguments))
