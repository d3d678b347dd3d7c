"""Prints what `test_kernel_code` checks, in a process where Triton compiles kernels.

python -m tests.bench.without_a_card FOLDER        one JSON object
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import kernel_code
from bench.carried import kernel_cache
from bench.kernel_code import Case
from bench.models.random_pair import Place, random_pair
from bench.models.shapes import SHAPES, TINY, Shape, Store
from mi_runtime.attention.paged import PagedAttention
from mi_runtime.attention.selector import uniform_plan
from mi_runtime.attention.triton_backend import TritonAttention
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.row_lambdas import StepRows
from mi_runtime.request import Dial

CPU = torch.device("cpu")
BLOCKS = 64
DENSE, EXPERTS = SHAPES["4b"], SHAPES["30b-a3b"]
LARGE_HEADS = replace(DENSE, head_dim=256)
WITH_SINKS = replace(DENSE, heads=64, head_dim=64)


# --- Launches that are compiled: the usual ones and the largest ----------------------------------


def cases() -> Iterator[Case]:
    bf16 = torch.bfloat16
    yield from products(2, "pair", "int8", "int4")
    yield from products(32, "pair")
    yield from products(64, "pair", "int4")
    yield from products(256, "pair", "int4")
    yield from products(64, "int4", dtype=torch.float32)
    for rows, kind in ((384, "int8"), (2048, "int4")):  # 24 and 128 an expert
        for case in kernel_code.experts("30b-a3b", EXPERTS, rows, bf16):
            if case.what == f"experts {kind}":
                yield case
    yield Case("4b", "writing KV", 8, partial(kernel_code.write, DENSE, 8, bf16))
    attention = {
        "decode in parts": partial(kernel_code.attend, EXPERTS, 2, 2, 262_144),
        "decode with window and sinks": partial(
            kernel_code.attend, WITH_SINKS, 8, 8, 1024, window=128, sinks=True
        ),
        "prefill": partial(kernel_code.attend, EXPERTS, 2048, 0, 2048),
        "prefill in parts": partial(kernel_code.attend, EXPERTS, 64, 0, 2048),
        "prefill of the largest heads": partial(
            kernel_code.attend, LARGE_HEADS, 2048, 0, 2048, window=512
        ),
    }
    for what, attend in attention.items():
        yield Case("attention", what, 0, partial(attend, dtype=bf16))


def products(rows: int, *kinds: str, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """Yields the products of one matrix, whose K is split if there are few rows."""
    for case in kernel_code.products("4b", DENSE, rows, dtype):
        if case.what in {f"output of attention {kind}" for kind in kinds}:
            yield case


# --- Launches that are only counted --------------------------------------------------------------


def variants() -> dict[str, list[str]]:
    """Returns the kernels that serving each model launches, by name and key."""
    return {model: known(model, shape) for model, shape in SHAPES.items()}


def known(model: str, shape: Shape) -> list[str]:
    return named(kernel_code.distinct(kernel_code.serving(model, shape)))


def launched(model: str, shape: Shape, store: Store) -> list[str]:
    """Returns what a model of this shape really launches."""
    pair = random_pair(shape, Place(CPU, torch.bfloat16, positions=256), store)
    pair.kernels.enable(rows=256)
    return named(kernel_code.distinct(forwards(model, shape, pair)))


def named(kernels: dict[tuple[str, str], list[str]]) -> list[str]:
    return [" ".join(kernel) for kernel in kernels]


def forwards(model: str, shape: Shape, pair: BlendedModel) -> Iterator[Case]:
    """Yields decodes and a prefill chunk at several λ, at one, at a blended one, and at 0."""
    attention = PagedAttention(
        pair.layers, BLOCKS, kernel_code.BLOCK_SIZE, torch.bfloat16, CPU, TritonAttention()
    )
    pair.groups.cache.places = 1
    for sequences, rows in ((8, 1), (1, 32)):
        mixed, one = (Dial(0.3), Dial(0.6)), (Dial(0.3),)
        for dials, blended in ((mixed, False), (one, False), (one, True), ((Dial(0.0),), False)):
            call = partial(forward, pair, attention, sequences, rows, dials, blended)
            yield Case(model, f"forward at {len(dials)}", sequences * rows, call)


def forward(
    pair: BlendedModel,
    attention: PagedAttention,
    sequences: int,
    rows: int,
    dials: tuple[Dial, ...],
    blended: bool,
) -> None:
    tokens, length = sequences * rows, 32
    index = tuple(row % len(dials) for row in range(tokens))
    pair.groups.begin(StepRows(dials, index, tuple(range(tokens)), blended))
    attention.begin(uniform_plan(sequences, length, rows, attention.block_size, BLOCKS, CPU))
    ids = torch.zeros(tokens, dtype=torch.int64)
    pair.logits(ids, ids, torch.arange(tokens), attention)


# --- A packed cache ------------------------------------------------------------------------------


def carried(folder: Path) -> dict[str, Any]:
    """Packs the kernel of one launch, unpacks it, and looks for it there."""
    few = [Case("4b", "writing KV", 8, partial(kernel_code.write, DENSE, 8, torch.bfloat16))]
    compile_few = partial(kernel_code.compiled, few, 90)
    packed = kernel_cache.pack(folder / "kernels.tar.xz", compile_few)
    unpacked = kernel_cache.unpack(folder / "kernels.tar.xz", folder / "elsewhere")
    with patch.dict(os.environ, TRITON_CACHE_DIR=str(folder / "elsewhere")):
        found = kernel_code.compiled(few)
    return {
        "packed": [one.found for one in packed],
        "unpacked": unpacked,
        "found": [one.found for one in found],
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    stores: tuple[tuple[str, Store], ...] = (
        ("4b", "pair"),
        ("30b-a3b", "pair"),
        ("30b-a3b", "int8"),
        ("30b-a3b", "int4"),
    )
    looked_at = {
        "variants": variants(),
        "known": {model: known(model, TINY[model]) for model in dict(stores)},
        "launched": [(model, launched(model, TINY[model], store)) for model, store in stores],
        "carried": carried(Path(sys.argv[1])),
        "compiled": [asdict(one) for one in kernel_code.compiled(cases())],
    }
    print(json.dumps(looked_at))
