"""Loads pairs once a session, for the engines of many tests.

A test that changes weights, or tests how a pair is loaded, loads one of its own.
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
    """Returns the pair's model on the CPU, in the state that it has after loading."""
    instruct, thinking = map(Path, directories)
    return as_loaded(_loaded(instruct, thinking, dtype, delta_dtype))


def engine_of(config: EngineConfig) -> Engine:
    """Returns a new engine around the shared model of its pair.

    If two engines share a model, the later one has the counters of blends and of ways.
    """
    directories = config.instruct, config.thinking
    return Engine(config, shared_model(directories, config.dtype, config.delta_dtype))


def as_loaded(model: BlendedModel) -> BlendedModel:
    """Resets what engines and tests set: rows, blended weights, kernels."""
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
    """Frees the models."""
    _loaded.cache_clear()
