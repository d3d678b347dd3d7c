"""At start, an engine captures what compiles, and reports what failed; nothing is captured here."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch._dynamo.exc import InternalTorchDynamoError

from mi_runtime.config import EngineConfig
from mi_runtime.execution import startup
from mi_runtime.execution.startup import CAPTURED, COMPILED, CaptureTrial
from mi_runtime.model.blend_cache import BlendCache

UNUSED = cast(Any, None)
GROUPS = SimpleNamespace(end=lambda: None, cache=BlendCache())
MODEL = cast(Any, SimpleNamespace(logits="as it runs", groups=GROUPS))


class FakeGraphs:
    """Stands for the CUDA graphs of a forward; an exception as the forward is raised."""

    keys = ("first", "second")

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def capture(self, keys: tuple[str, ...] = keys) -> None:
        assert keys
        if isinstance(self.forward, Exception):
            raise self.forward


def capture(
    monkeypatch: pytest.MonkeyPatch, forward: Any, how: str
) -> tuple[Any, str | None, list[str]]:
    monkeypatch.setattr(startup, "_graphs", lambda *arguments: FakeGraphs(arguments[3]))
    trial = CaptureTrial(forward, how, stream=UNUSED, first_bytes=0, next_bytes=0)
    failures: list[str] = []
    return *startup._capture_all(UNUSED, MODEL, UNUSED, trial, failures), failures


def test_a_forward_that_compiles_is_captured_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, how, failures = capture(monkeypatch, "compiled", COMPILED)
    assert (graphs.forward, how, failures) == ("compiled", COMPILED, [])


def test_a_forward_that_fails_to_compile_is_captured_without_compilation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The traceback is printed, and the reason is reported in one line."""
    error = InternalTorchDynamoError("a way of its own\nand where")
    graphs, how, failures = capture(monkeypatch, error, COMPILED)
    assert (graphs.forward, how) == ("as it runs", CAPTURED)
    assert failures == ["with torch.compile: a way of its own"]
    printed = capsys.readouterr().err
    assert "CUDA graph capture with torch.compile failed: a way of its own\n" in printed
    assert "Traceback" in printed


def test_a_forward_that_fails_without_compilation_is_not_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs, how, failures = capture(monkeypatch, RuntimeError("broken"), CAPTURED)
    assert (graphs, how, failures) == (None, None, ["without torch.compile: broken"])


def test_running_out_of_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        capture(monkeypatch, torch.OutOfMemoryError("full"), COMPILED)


# --- Reports of a GPU, without one ----------------------------------------------------------------


@pytest.fixture
def report_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Reports CUDA graphs as on a GPU: `report_of(compiled, plain, **settings)`.

    If a forward is an exception, capturing it raises that exception.
    """

    def report(compiled: Any, plain: Any, backend: str = "triton", **settings: Any) -> str:
        monkeypatch.setattr(startup, "_graphs", lambda *arguments: FakeGraphs(arguments[3]))
        monkeypatch.setattr(startup, "compiled_logits", lambda model: compiled)
        monkeypatch.setattr(startup, "memory_taken_by", lambda act: (0, act()))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        failures: list[str] = []
        attention = cast(Any, SimpleNamespace(backend=SimpleNamespace(name=backend)))
        model = cast(Any, SimpleNamespace(logits=plain, groups=GROUPS))
        config = EngineConfig("instruct", "thinking", **settings)
        trial = startup._try_capture(config, model, attention, failures)
        return startup._graphs_description(trial and trial.how, 70, 9.4, failures)

    return report


BROKEN = RuntimeError("CUDA error: operation not permitted\nwhen a stream is capturing")


def test_engines_report_what_was_captured_and_what_failed(report_of: Callable[..., str]) -> None:
    """A server starts in any case; a bench can check the report."""
    assert report_of("compiled", "plain") == "70 captured and compiled, in 9 s"
    assert report_of("compiled", "plain", torch_compile=False) == "70 captured, in 9 s"
    reason = "CUDA error: operation not permitted"
    assert report_of(BROKEN, "plain") == f"70 captured, in 9 s (with torch.compile: {reason})"
    both = f"none (with torch.compile: {reason}; without torch.compile: {reason})"
    assert report_of(BROKEN, BROKEN) == both
    reference = "none (the reference attention backend cannot be captured)"
    assert report_of("compiled", "plain", backend="reference") == reference
    assert report_of("compiled", "plain", cuda_graphs=False) == "none"


def test_the_first_cause_of_a_failed_capture_is_reported_too() -> None:
    """CUDA reports at a capture's end that it failed; the first error was raised inside."""
    try:
        try:
            raise BROKEN
        finally:
            raise RuntimeError("capture was invalidated")
    except RuntimeError as error:
        causes = startup._causes(error)
    assert causes == "capture was invalidated, caused by CUDA error: operation not permitted"
