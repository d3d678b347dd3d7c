"""The engine on a plain checkpoint, without any pair module: the baseline for blending."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from bench.models.workloads import Pair
from mi_runtime.attention.plan import LayerShape
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.kernels.dispatch import KernelDispatch
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.load import DTYPES, load_static, use_paged_attention
from mi_runtime.model.pair_check import check_pair
from mi_runtime.model.row_lambdas import BlendGroups

NUM_BLOCKS = 2048


def write_merged(pair: Pair, value: float, directory: Path) -> Path:
    """Writes a checkpoint merged at λ in fp32 and rounded once, unless it exists."""
    if (directory / "model.safetensors").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    low, high = (
        load_file(Path(end) / "model.safetensors") for end in (pair.instruct, pair.thinking)
    )
    merged = {
        name: torch.lerp(tensor.float(), high[name].float(), value).to(tensor.dtype)
        for name, tensor in low.items()
    }
    save_file(merged, directory / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_bytes((Path(pair.instruct) / name).read_bytes())
    return directory


class StaticEngine(Engine):
    """The engine on a model whose modules are not swapped: a server's engine without blending."""

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        endpoint = check_pair(directory, directory).instruct
        plain = load_static(endpoint, config.device, DTYPES[config.dtype])
        only = replace(config, blend_policy="pair", prefix_caching=False)  # as there is one way
        super().__init__(only, static_model(plain))


def static_model(plain: PreTrainedModel) -> BlendedModel:
    """Returns a plain model with the engine's attention, as a model that has no blend groups.

    Its engine needs a `blend_policy` other than `auto`, because there is no choice to measure.
    """
    use_paged_attention(plain)
    shape, device = plain.config, plain.device
    layer = LayerShape(
        shape.num_key_value_heads, shape.head_dim, shape.head_dim, shape.num_attention_heads
    )
    return BlendedModel(
        model=plain,
        groups=NoGroups(0, device, BlendCache(), endpoints={}),
        kernels=KernelDispatch(),
        layers=(layer,) * shape.num_hidden_layers,
        device=device,
        dtype=plain.dtype,
        vocab_size=shape.vocab_size,
        weight_bytes=sum(tensor.nbytes for tensor in plain.parameters()),
        peak_bytes=0,
        load_seconds=0,
        identity="static",
        max_positions=shape.max_position_embeddings,
    )


class NoGroups(BlendGroups):
    """Replaces blend groups in a model whose modules have none; they cost a step nothing."""

    def begin(self, *_: Any, **__: Any) -> None: ...

    def end(self) -> None: ...


def blended_config(pair: Pair, **changes: Any) -> EngineConfig:
    base = EngineConfig(
        pair.instruct,
        pair.thinking,
        device="cpu",
        dtype=pair.dtype,
        num_blocks=NUM_BLOCKS,
        prefix_caching=False,
    )
    return replace(base, **changes)
