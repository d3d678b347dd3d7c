"""Merged weights on disk equal the same sums over complete tensors, for every method."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mi_runtime.errors import PairError
from mi_runtime.model import merge_weights
from mi_runtime.model.merge_weights import (
    Interpolation,
    Method,
    TaskArithmetic,
    Ties,
    write_weights,
)
from mi_runtime.model.pair_check import Pair, check_base, check_pair
from mi_runtime.model.swap import group_of
from mi_runtime.request import Dial
from tests.runtime import oracle
from tests.runtime.families import write_checkpoint

Directories = tuple[Path, Path]
PairOf = Callable[..., Directories]
Tensors = dict[str, Tensor]


def merged(pair: Directories | Pair, method: Method, out: Path, **options: Any) -> Tensors:
    checked = pair if isinstance(pair, Pair) else check_pair(*pair)
    write_weights(checked.instruct, checked.thinking, method, out, **options)
    return load_all(out)


def load_all(directory: Path) -> Tensors:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "starcoder2"])
def test_a_merged_checkpoint_equals_the_oracles(
    pair_of: PairOf, tmp_path: Path, family: str
) -> None:
    pair = pair_of(family)
    found = merged(pair, Interpolation(Dial(0.3)), tmp_path)
    low, high = (load_all(directory) for directory in pair)
    assert_same(found, {name: torch.lerp(low[name], high[name], 0.3) for name in low})
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((pair[0] / name).read_bytes())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = list(range(3, 20))
    assert torch.equal(
        oracle.logits(model, tokens), oracle.logits(oracle.merged(*pair, 0.3), tokens)
    )


def test_merging_in_pieces_equals_merging_at_once(
    qwen3_pair: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_weights, "PIECE", 7)
    found = merged(qwen3_pair, Interpolation(Dial(0.6)), tmp_path)
    low, high = (load_all(directory) for directory in qwen3_pair)
    assert_same(found, {name: torch.lerp(low[name], high[name], 0.6) for name in low})


@pytest.mark.parametrize(("value", "endpoint"), [(0.0, 0), (1.0, 1)])
def test_λ_0_and_1_give_the_bits_of_the_endpoints(
    pair_of: PairOf, tmp_path: Path, value: float, endpoint: int
) -> None:
    pair = pair_of("qwen3", dtype=torch.bfloat16)
    assert_same(merged(pair, Interpolation(Dial(value)), tmp_path), load_all(pair[endpoint]))


def test_a_bf16_checkpoint_is_rounded_once(pair_of: PairOf, tmp_path: Path) -> None:
    pair = pair_of("qwen3", dtype=torch.bfloat16)
    low, high = (load_all(directory) for directory in pair)
    exact = {name: torch.lerp(low[name].float(), high[name].float(), 0.7) for name in low}
    for dtype in (None, torch.float32):
        out = tmp_path / str(dtype)
        out.mkdir()
        found = merged(pair, Interpolation(Dial(0.7)), out, dtype=dtype)
        assert_same(found, {k: v.to(dtype or torch.bfloat16) for k, v in exact.items()})


def test_every_blend_group_has_its_own_lambda(qwen3_pair: Directories, tmp_path: Path) -> None:
    dial = Dial(0.5, (("0.attn", 0.0), ("1.mlp", 1.0), ("embed", 0.25)))
    found = merged(qwen3_pair, Interpolation(dial), tmp_path, untie=True)
    low, high = (load_all(directory) for directory in qwen3_pair)
    expected = {k: torch.lerp(low[k], high[k], dial.value_of(group_of(k))) for k in low}
    embedding = "model.embed_tokens.weight"
    expected["lm_head.weight"] = torch.lerp(low[embedding], high[embedding], 0.5)
    assert_same(found, expected)


def test_shards_are_those_of_the_instruct_endpoint(qwen3_pair: Directories, tmp_path: Path) -> None:
    whole, sharded = (Path(tmp_path / name) for name in ("whole", "sharded"))
    low = load_all(qwen3_pair[0])
    sharded.mkdir()
    for path in qwen3_pair[0].glob("*.json"):
        (sharded / path.name).write_bytes(path.read_bytes())
    names = sorted(low)
    where = {
        name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)
    }
    for file in set(where.values()):
        save_file({k: low[k] for k in names if where[k] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for out, instruct in ((whole, qwen3_pair[0]), (tmp_path / "out", sharded)):
        out.mkdir()
        merged((instruct, qwen3_pair[1]), Interpolation(Dial(0.4)), out)
    assert_same(load_all(tmp_path / "out"), load_all(whole))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in low.values())


# --- baselines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of a base model."""
    directory = tmp_path_factory.mktemp("base")
    write_checkpoint(directory, "qwen3", seed=7)
    return directory


def test_task_arithmetic_adds_both_task_vectors(
    qwen3_pair: Directories, base: Path, tmp_path: Path
) -> None:
    pair = check_pair(*qwen3_pair)
    found = merged(pair, TaskArithmetic(0.7), tmp_path, base=check_base(base, pair))
    low, high, origin = (load_all(directory) for directory in (*qwen3_pair, base))
    for name, tensor in found.items():
        task = (low[name] - origin[name]) + (high[name] - origin[name])
        assert torch.allclose(tensor, origin[name] + 0.7 * task, atol=1e-6), name


def test_task_arithmetic_over_instruct_is_an_interpolation(
    qwen3_pair: Directories, tmp_path: Path
) -> None:
    """With the Instruct endpoint as the base, its own task vector is zero."""
    pair = check_pair(*qwen3_pair)
    found = merged(pair, TaskArithmetic(0.6), tmp_path, base=pair.instruct)
    low, high = (load_all(directory) for directory in qwen3_pair)
    for name, tensor in found.items():
        assert torch.allclose(tensor, torch.lerp(low[name], high[name], 0.6), atol=1e-6), name


def slow_ties(base: list[float], tasks: list[list[float]], kept: int, scale: float) -> list[float]:
    """Computes TIES entry by entry, as the paper describes it."""
    trimmed = []
    for task in tasks:
        largest = sorted(range(len(task)), key=lambda at, task=task: -abs(task[at]))[:kept]
        trimmed.append([value if at in largest else 0.0 for at, value in enumerate(task)])
    out = []
    for start, *entries in zip(base, *trimmed, strict=True):
        total = sum(entries)
        agreeing = [entry for entry in entries if entry * total > 0]
        out.append(start + scale * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return out


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_elects_a_sign_and_averages(density: float) -> None:
    generator = torch.Generator().manual_seed(3)
    base, low, high = (torch.randn(50, generator=generator) for _ in range(3))
    (found,) = Ties(density, 0.5).pieces("head", merge_weights.Sources(low, high, base))
    tasks = [(one - base).tolist() for one in (low, high)]
    expected = slow_ties(base.tolist(), tasks, round(density * 50), 0.5)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def test_a_base_of_another_shape_is_refused_by_its_tensors(
    qwen3_pair: Directories, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, "qwen3", seed=7, intermediate_size=64)
    with pytest.raises(PairError, match=r"up_proj\.weight: the base has shape \(64, 48\)"):
        check_base(tmp_path, check_pair(*qwen3_pair))
