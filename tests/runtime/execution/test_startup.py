"""What is recorded at start where compiling or recording fails; nothing is recorded here."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch._dynamo.exc import InternalTorchDynamoError

from mi_runtime.config import EngineConfig
from mi_runtime.execution import startup
from mi_runtime.execution.startup import COMPILED, RECORDED, RecordingTrial
from mi_runtime.model.blend_cache import BlendCache

UNUSED = cast(Any, None)
GROUPS = SimpleNamespace(end=lambda: None, cache=BlendCache())
MODEL = cast(Any, SimpleNamespace(logits="as it runs", groups=GROUPS))


class Fake:
    """Stands for recordings of one forward, which may raise when they are made."""

    keys = ("first", "second")

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def record(self, keys: tuple[str, ...] = keys) -> None:
        assert keys
        if isinstance(self.forward, Exception):
            raise self.forward


def recorded(
    monkeypatch: pytest.MonkeyPatch, forward: Any, how: str
) -> tuple[Any, str | None, list[str]]:
    monkeypatch.setattr(startup, "_graphs", lambda *arguments: Fake(arguments[3]))
    trial = RecordingTrial(forward, how, stream=UNUSED, first_bytes=0, next_bytes=0)
    failures: list[str] = []
    return *startup._record_all(UNUSED, MODEL, UNUSED, trial, failures), failures


def test_what_compiles_is_recorded_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, how, failures = recorded(monkeypatch, "compiled", COMPILED)
    assert (graphs.forward, how, failures) == ("compiled", COMPILED, [])


def test_where_a_way_fails_to_compile_all_is_recorded_as_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is printed with where it failed, and told in one line."""
    error = InternalTorchDynamoError("a way of its own\nand where")
    graphs, how, failures = recorded(monkeypatch, error, COMPILED)
    assert (graphs.forward, how) == ("as it runs", RECORDED)
    assert failures == ["with torch.compile: a way of its own"]
    printed = capsys.readouterr().err
    assert "not recorded and compiled: a way of its own\n" in printed
    assert "Traceback" in printed


def test_what_fails_as_it_runs_too_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, how, failures = recorded(monkeypatch, RuntimeError("broken"), RECORDED)
    assert (graphs, how, failures) == (None, None, ["without torch.compile: broken"])


def test_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        recorded(monkeypatch, torch.OutOfMemoryError("full"), COMPILED)


# --- On a GPU that is not there -------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`on_gpu(forwards, **settings)`: what is told of recordings where the compiled forward and the
    plain one are these; an exception is what recording them raises."""

    def told(compiled: Any, plain: Any, backend: str = "triton", **settings: Any) -> str:
        monkeypatch.setattr(startup, "_graphs", lambda *arguments: Fake(arguments[3]))
        monkeypatch.setattr(startup, "compiled_logits", lambda model: compiled)
        monkeypatch.setattr(startup, "memory_taken_by", lambda act: (0, act()))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        failures: list[str] = []
        attention = cast(Any, SimpleNamespace(backend=SimpleNamespace(name=backend)))
        model = cast(Any, SimpleNamespace(logits=plain, groups=GROUPS))
        config = EngineConfig("instruct", "thinking", **settings)
        trial = startup._try_recording(config, model, attention, failures)
        return startup._graphs_description(trial and trial.how, 70, 9.4, failures)

    return told


BROKEN = RuntimeError("CUDA error: operation not permitted\nwhen a stream is capturing")


def test_engines_tell_what_was_recorded_and_why_not_more(on_gpu: Callable[..., str]) -> None:
    """A server runs in any case; a bench can ask for what it needs."""
    assert on_gpu("compiled", "plain") == "70 recorded and compiled, in 9 s"
    assert on_gpu("compiled", "plain", torch_compile=False) == "70 recorded, in 9 s"
    reason = "CUDA error: operation not permitted"
    assert on_gpu(BROKEN, "plain") == f"70 recorded, in 9 s (with torch.compile: {reason})"
    both = f"none (with torch.compile: {reason}; without torch.compile: {reason})"
    assert on_gpu(BROKEN, BROKEN) == both
    waits = "none (the reference attention waits for the host)"
    assert on_gpu("compiled", "plain", backend="reference") == waits
    assert on_gpu("compiled", "plain", cuda_graphs=False) == "none"


def test_what_a_failed_recording_hides_is_told_as_well() -> None:
    """CUDA says at a recording's end that it failed before; what failed was raised inside."""
    try:
        try:
            raise BROKEN
        finally:
            raise RuntimeError("capture was invalidated")
    except RuntimeError as error:
        told = startup._causes(error)
    assert told == "capture was invalidated, after CUDA error: operation not permitted"
