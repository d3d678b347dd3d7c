"""Every logits processor is applied; what each one does is tested in `test_sampler.py`."""

from mi_runtime.execution import logits_processors
from mi_runtime.execution.logits_processors import LogitsProcessor, LogitsProcessors


def test_every_processor_is_applied_once() -> None:
    applied = [type(processor) for processor in LogitsProcessors()._all]
    defined = {
        kind
        for kind in vars(logits_processors).values()
        if isinstance(kind, type) and issubclass(kind, LogitsProcessor)
    }
    assert len(applied) == len(set(applied))
    assert set(applied) == defined - {LogitsProcessor}
