"""What is recorded at start where compilation fails late; nothing is recorded here."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch._dynamo.exc import InternalTorchDynamoError

from mi_runtime import start
from mi_runtime.start import RECORDED, Recordable


class Fake:
    """Stands for recordings of one forward, which may raise when they are made."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def record(self) -> None:
        if isinstance(self.forward, Exception):
            raise self.forward


def recorded(monkeypatch: pytest.MonkeyPatch, forward: Any, how: str) -> tuple[Any, str]:
    monkeypatch.setattr(start, "_recordings", lambda *arguments: Fake(arguments[-1]))
    model = SimpleNamespace(logits="as it runs", groups=SimpleNamespace(end=lambda: None))
    recordable = Recordable(forward, how, first=0, each=0)
    unused = cast(Any, None)
    return start._recorded(unused, cast(Any, model), unused, recordable)


def test_what_compiles_is_recorded_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, how = recorded(monkeypatch, "compiled", "recorded and compiled")
    assert (graphs.forward, how) == ("compiled", "recorded and compiled")


def test_where_a_way_fails_to_compile_all_is_recorded_as_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = InternalTorchDynamoError("a way of its own\nand where")
    graphs, how = recorded(monkeypatch, error, "recorded and compiled")
    assert (graphs.forward, how) == ("as it runs", RECORDED)
    assert "not recorded and compiled: a way of its own\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (torch.OutOfMemoryError("full"), "recorded and compiled"),
        (RuntimeError("broken"), RECORDED),
    ],
)
def test_no_memory_and_what_fails_as_it_runs_are_errors(
    monkeypatch: pytest.MonkeyPatch, error: Exception, how: str
) -> None:
    with pytest.raises(type(error)):
        recorded(monkeypatch, error, how)
