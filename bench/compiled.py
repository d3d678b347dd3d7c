"""Counts the graphs that a model's decode steps compile to, and times their compilation.

    TORCHINDUCTOR_CACHE_DIR=DIR python -m bench.compiled --layers 36

Uses a random pair of tiny width and inductor's CPU backend, so it needs no GPU. The seconds are not
those of a GPU. But they grow with the number of layers as they do there, and a second run with the
same cache directory finds what it would find there. Triton kernels are interpreted.
"""

import argparse
import json
import os
from dataclasses import replace

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton loads

import torch
from torch._dynamo.utils import calculate_time_spent, counters

from bench.models.random_pair import Place, random_pair
from bench.models.shapes import Shape
from mi_runtime.attention.paged import PagedAttention
from mi_runtime.attention.selector import make_backend
from mi_runtime.execution.compiled_layers import compiled_logits
from mi_runtime.execution.decode_graphs import DecodeGraphs
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.blended_model import BlendedModel

TINY = Shape(1, hidden=64, inner=128, heads=4, kv_heads=2, head_dim=16, vocabulary=64, tied=True)
PLACE = Place(torch.device("cpu"), torch.float32, positions=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    layers = parser.parse_args().layers
    model = random_pair(replace(TINY, layers=layers), PLACE, "pair")
    model.kernels.enable(rows=64)
    model.groups.cache = BlendCache(places=2)
    run_all(model)
    hits, misses = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
    summary = {
        "layers": layers,
        "graphs": counters["stats"]["unique_graphs"],
        "seconds": round(calculate_time_spent()["total_wall_time"], 1),
        "found in the cache": hits,
        "not found": misses,
        "torch": torch.__version__,
    }
    print(json.dumps(summary))


def run_all(model: BlendedModel) -> None:
    """Compiles and runs decode steps of 2 and 4 rows, for each way that a group can be computed."""
    attention = PagedAttention(
        *(model.layers, 16, 4, model.dtype, model.device, make_backend("triton"))
    )
    graphs = DecodeGraphs(
        *(model, attention, lambda run: run),
        sizes=(2, 4),
        max_blocks=4,
        forward=compiled_logits(model),
    )
    with torch.inference_mode():
        graphs.capture()
        for key in graphs.keys:
            graphs._replays[key]()


if __name__ == "__main__":
    main()
