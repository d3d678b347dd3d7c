"""Pairs that are loaded once a session, for the engines of many tests.

A test that changes weights, or looks at how a pair is loaded, loads one of its own.
"""

from functools import cache
from pathlib import Path

from mi_runtime.config import DeltaDtype, Dtype, EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.load import load_pair
from mi_runtime.model.pair_check import check_pair


def shared_model(
    directories: tuple[Path | str, Path | str],
    dtype: Dtype = "float32",
    delta_dtype: DeltaDtype = "none",
) -> BlendedModel:
    """A CPU model as it is after loading; the tests that had it before leave nothing in it."""
    instruct, thinking = map(Path, directories)
    return as_loaded(_loaded(instruct, thinking, dtype, delta_dtype))


def engine_of(config: EngineConfig) -> Engine:
    """An engine of its own around the shared model of its pair.

    Of two engines around one model the later one has the counters of blends and of ways.
    """
    directories = config.instruct, config.thinking
    return Engine(config, shared_model(directories, config.dtype, config.delta_dtype))


def as_loaded(model: BlendedModel) -> BlendedModel:
    """Takes back what engines and tests set: rows, blended weights, kernels."""
    groups = model.groups
    groups.end()
    groups.cache = BlendCache()
    groups._last = None
    model.kernels.enable(rows=0, experts=False)
    return model


@cache
def _loaded(instruct: Path, thinking: Path, dtype: Dtype, delta_dtype: DeltaDtype) -> BlendedModel:
    return load_pair(check_pair(instruct, thinking), "cpu", dtype, delta_dtype)


def forget_all() -> None:
    _loaded.cache_clear()
