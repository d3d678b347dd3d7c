"""Our engine on plain checkpoints, without any blend module: what blending is measured against."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.workload import Pair
from mi_runtime.attention import LayerShape
from mi_runtime.blocks import BlockPool
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.load import DTYPES, BlendedModel, load_static
from mi_runtime.pair import check_pair
from mi_runtime.planner import Part
from mi_runtime.runner import Runner
from mi_runtime.scheduler import Chunk, Scheduler
from mi_runtime.thinking import TokenMarks

NUM_BLOCKS = 2048


def write_merged(pair: Pair, value: float, directory: Path) -> Path:
    """A checkpoint merged at λ in fp32 and rounded once; kept where it is there already."""
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
    """The engine's scheduler, attention and sampler over an unswapped model."""

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        endpoint = check_pair(directory, directory).instruct
        dtype = DTYPES[config.dtype]
        plain = load_static(endpoint, "cpu", dtype)
        shape = plain.config
        layer = LayerShape(shape.num_key_value_heads, shape.head_dim, shape.head_dim)
        model = BlendedModel(
            model=plain,
            groups=NoGroups(),  # type: ignore[arg-type]
            layers=(layer,) * shape.num_hidden_layers,
            device=torch.device("cpu"),
            dtype=dtype,
            vocab_size=shape.vocab_size,
            weight_bytes=0,
            peak_bytes=0,
            load_seconds=0,
        )
        self.scheduler = Scheduler(
            BlockPool(NUM_BLOCKS, config.block_size),
            vocab_size=shape.vocab_size,
            max_model_len=shape.max_position_embeddings,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            prefix_caching=False,
        )
        self._runner = Runner(model, OnePart(), NUM_BLOCKS, config.block_size)  # type: ignore[arg-type]
        self._marks = TokenMarks()
        self._grammars = None
        self._compiling = {}
        self._asynchronous = False
        self._flight = None
        self._steps = 0


class NoGroups:
    """In the place of blend groups, where no module has one."""

    def begin(self, _step: Any, _first: bool) -> None: ...

    def end(self) -> None: ...


class OnePart:
    """In the place of the planner."""

    def plan(self, chunks: list[Chunk]) -> list[Part]:
        return [Part(chunks, blended=False)]


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
