"""Writes the weights of a merged checkpoint, by one of three methods.

    interpolation     λ·Θ_T + (1−λ)·Θ_I, with a λ for each blend group
    task arithmetic   Θ_B + s·(τ_I + τ_T), τ = Θ − Θ_B              (arXiv 2212.04089)
    TIES              Θ_B + s·τ, where τ is the mean of τ_I and τ_T after each tensor keeps only
                      its largest entries, and entries whose sign differs from that of the sum
                      are dropped (arXiv 2306.01708, trimmed tensor by tensor)

The sources are mapped files and the result is written piece by piece, so that memory does not grow
with the model (TIES needs a few fp32 copies of one tensor). Everything is computed in fp32 and
rounded once to the output format. The shards are those of the Instruct endpoint. This module writes
weights only; `server/merge` writes the tokenizer, templates and model card.

The `safetensors` library needs all tensors in memory, twice while it writes. Its format is a
length, a JSON header and the bytes, so this module writes the header itself.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from mi_runtime.errors import PairError
from mi_runtime.model.pair_check import Checkpoint, check_base, check_pair
from mi_runtime.model.swap import group_of
from mi_runtime.request import Dial

PIECE = 2**18  # elements computed at once, which fit in a core's cache
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"  # the same tensor in a tied model
NAME_OF_DTYPE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointTensors:
    """The tensors of one checkpoint by name, mapped from its files inside the context."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._paths = files
        self._files: dict[str, Any] = {}  # by tensor name
        self.shards: dict[str, list[str]] = {}  # tensor names by file
        self._open = ExitStack()  # of the files

    def __enter__(self) -> "CheckpointTensors":
        with ExitStack() as stack:
            for path in self._paths:
                file = stack.enter_context(safe_open(path, framework="pt"))
                self.shards[path.name] = list(file.keys())
                self._files |= dict.fromkeys(self.shards[path.name], file)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


@dataclass(frozen=True, slots=True)
class Sources:
    """The same tensor in every checkpoint, flat, in its stored dtype: `[elements]`."""

    instruct: Tensor
    thinking: Tensor
    base: Tensor | None


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """The open checkpoints that are merged."""

    instruct: CheckpointTensors
    thinking: CheckpointTensors
    base: CheckpointTensors | None

    def sources(self, name: str) -> Sources:
        """Returns the tensor `name` of every checkpoint."""
        return Sources(
            self.instruct[name].reshape(-1),
            self.thinking[name].reshape(-1),
            None if self.base is None else self.base[name].reshape(-1),
        )


class Method(Protocol):
    """How two tensors, and that of the base, are merged."""

    def pieces(self, group: str, sources: Sources) -> Iterator[Tensor]:
        """Yields the merged tensor, flat, in pieces of a floating-point dtype."""


@dataclass(frozen=True, slots=True)
class Interpolation:
    """λ·Θ_T + (1−λ)·Θ_I."""

    dial: Dial

    def pieces(self, group: str, sources: Sources) -> Iterator[Tensor]:
        value = self.dial.value_of(group)
        for low, high in _split(sources.instruct, sources.thinking):
            yield torch.lerp(low, high, value, out=low)


@dataclass(frozen=True, slots=True)
class TaskArithmetic:
    """Θ_B + s·(τ_I + τ_T)."""

    scale: float

    def pieces(self, group: str, sources: Sources) -> Iterator[Tensor]:
        assert sources.base is not None
        for base, low, high in _split(sources.base, sources.instruct, sources.thinking):
            yield low.sub_(base).add_(high.sub_(base)).mul_(self.scale).add_(base)


@dataclass(frozen=True, slots=True)
class Ties:
    """Θ_B + s·τ, with τ as TIES merges the task vectors."""

    density: float  # share of each task vector's entries to keep
    scale: float

    def pieces(self, group: str, sources: Sources) -> Iterator[Tensor]:
        assert sources.base is not None
        base = sources.base.float()
        tasks = [self._trimmed(one.float() - base) for one in (sources.instruct, sources.thinking)]
        sign = torch.sign(tasks[0] + tasks[1])
        agreeing = [torch.where(task.sign() == sign, task, 0.0) for task in tasks]
        count = (agreeing[0] != 0).float() + (agreeing[1] != 0).float()
        yield base + self.scale * (agreeing[0] + agreeing[1]) / count.clamp_(min=1.0)

    def _trimmed(self, task: Tensor) -> Tensor:
        """Zeroes all but the largest entries. Entries equal to the smallest kept one are kept."""
        kept = max(1, round(self.density * task.numel()))
        least = task.abs().kthvalue(task.numel() - kept + 1).values
        return torch.where(task.abs() >= least, task, 0.0)


def _split(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields matching pieces of all tensors in fp32, in buffers that the next piece reuses."""
    buffers = [torch.empty(min(PIECE, tensor.numel())) for tensor in tensors]
    for pieces in zip(*(torch.split(tensor, PIECE) for tensor in tensors), strict=True):
        yield tuple(
            buffer[: len(piece)].copy_(piece) for buffer, piece in zip(buffers, pieces, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the merged checkpoint."""

    name: str
    source: str  # its name in the endpoints
    group: str  # the blend group whose λ it takes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    instruct: Checkpoint,
    thinking: Checkpoint,
    method: Method,
    out: Path,
    *,
    base: Checkpoint | None = None,
    dtype: torch.dtype | None = None,
    untie: bool = False,
) -> None:
    """Writes the shards, and an index if there are several, to the directory `out`.

    `dtype` is the dtype of floating-point tensors; None keeps those of the Instruct endpoint. With
    `untie`, a model whose head is its embedding gets a separate head. Raises PairError if integer
    tensors of the endpoints differ.
    """
    with ExitStack() as stack:
        low, high = (
            stack.enter_context(CheckpointTensors(one.files)) for one in (instruct, thinking)
        )
        origin = None if base is None else stack.enter_context(CheckpointTensors(base.files))
        inputs = MergeInputs(low, high, origin)
        shards = {
            file: _outputs(low, names, dtype, untie=untie) for file, names in low.shards.items()
        }
        count = sum(map(len, shards.values()))
        with tqdm(total=count, desc="Merging", unit="tensor", disable=None) as progress:
            for file, outputs in shards.items():
                with (out / file).open("wb") as shard:
                    shard.write(_header(outputs))
                    for output in outputs:
                        _write_tensor(shard, output, method, inputs)
                        progress.update()
                    shard.flush()
                    os.fsync(shard.fileno())
    if len(shards) > 1:
        _write_index(out, shards)


def _outputs(
    low: CheckpointTensors, names: Sequence[str], dtype: torch.dtype | None, *, untie: bool
) -> list[Output]:
    """Returns the tensors of one shard, widest dtypes first, so that all are aligned."""
    outputs = []
    for name in names:
        tensor = low[name]
        kind = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        outputs.append(Output(name, name, group_of(name), tuple(tensor.shape), kind))
        if untie and name.endswith(EMBEDDING) and HEAD not in low:
            outputs.append(Output(HEAD, name, group_of(HEAD), tuple(tensor.shape), kind))
    return sorted(outputs, key=lambda one: (-one.dtype.itemsize, one.name))


def _header(outputs: Sequence[Output]) -> bytes:
    """Returns a safetensors header: its length in eight bytes, then JSON padded with spaces."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for output in outputs:
        entries[output.name] = {
            "dtype": NAME_OF_DTYPE[output.dtype],
            "shape": output.shape,
            "data_offsets": [start, start + output.nbytes],
        }
        start += output.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(shard: BinaryIO, output: Output, method: Method, inputs: MergeInputs) -> None:
    sources = inputs.sources(output.source)
    if sources.instruct.is_floating_point():
        for piece in method.pieces(output.group, sources):
            shard.write(_bytes(piece.to(output.dtype)))
    elif torch.equal(sources.instruct, sources.thinking):
        shard.write(_bytes(sources.instruct))
    else:
        raise PairError([f"tensor {output.name}: integers that differ cannot be merged"])


def _bytes(flat: Tensor) -> memoryview:
    return flat.contiguous().view(torch.uint8).numpy().data


def _write_index(out: Path, shards: Mapping[str, Sequence[Output]]) -> None:
    total = sum(output.nbytes for outputs in shards.values() for output in outputs)
    where = {output.name: file for file, outputs in shards.items() for output in outputs}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (out / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def main() -> int:
    """Runs the process that `mi-server merge` starts, and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("instruct", "thinking", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--method", choices=("interpolation", "task-arithmetic", "ties"))
    parser.add_argument("--dial", type=json.loads, help="[λ, [[group, λ], …]]")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--density", type=float)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--untie", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # pieces are too small for several threads
    try:
        _merge(arguments)
    except PairError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _merge(arguments: argparse.Namespace) -> None:
    pair = check_pair(arguments.instruct, arguments.thinking)
    base = None if arguments.base is None else check_base(arguments.base, pair)
    write_weights(
        pair.instruct,
        pair.thinking,
        _method(arguments),
        arguments.out,
        base=base,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        untie=arguments.untie,
    )


def _method(arguments: argparse.Namespace) -> Method:
    match arguments.method:
        case "task-arithmetic":
            return TaskArithmetic(arguments.scale)
        case "ties":
            return Ties(arguments.density, arguments.scale)
    value, groups = arguments.dial
    return Interpolation(Dial(value, tuple((name, one) for name, one in groups)))


if __name__ == "__main__":
    sys.exit(main())
