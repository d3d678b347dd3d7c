"""Every reason for which two directories cannot be served as a pair is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mi_runtime.config import DeltaDtype
from mi_runtime.errors import PairError
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.load import load_pair
from mi_runtime.model.pair_check import Pair, check_pair
from mi_runtime.model.pair_check import fingerprint as fingerprint_of
from tests.runtime.families import write_pair, write_tokenizer

Directories = tuple[Path, Path]
PairOf = Callable[..., Directories]
GRID = 0.01


@pytest.fixture
def pair(qwen3_pair: Directories, tmp_path: Path) -> Directories:
    """Returns a copy of a good pair, which the test may damage."""
    return copied(qwen3_pair, tmp_path / "pair")


def copied(pair: Directories, to: Path) -> Directories:
    for endpoint in pair:
        shutil.copytree(endpoint, to / endpoint.name)
    return to / pair[0].name, to / pair[1].name


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_config(*directories: Path, **changes: Any) -> None:
    for directory in directories:
        edit_json(directory / "config.json", **changes)


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites the checkpoint after `edit` has changed its tensors in place."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def problems_of(pair: Directories) -> list[str]:
    """Returns the problems that the check of this pair finds."""
    with pytest.raises(PairError) as caught:
        check_pair(*pair)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return caught.value.problems


def only_problem_of(pair: Directories) -> str:
    (problem,) = problems_of(pair)
    return problem


def load(pair: Directories) -> BlendedModel:
    return load_pair(check_pair(*pair), "cpu", "float32")


def load_problems_of(pair: Directories) -> list[str]:
    """Returns the problems that loading finds in a pair that passes the check."""
    checked = check_pair(*pair)
    with pytest.raises(PairError) as caught:
        load_pair(checked, "cpu", "float32")
    return caught.value.problems


def test_a_good_pair_is_served(pair: Directories) -> None:
    checked = check_pair(str(pair[0]), str(pair[1]))
    assert isinstance(checked, Pair)
    assert checked.max_positions == 256


# --- Files --------------------------------------------------------------------------------------


def test_a_directory_that_is_not_there_is_named(pair: Directories, tmp_path: Path) -> None:
    assert only_problem_of((pair[0], tmp_path / "no")) == f"{tmp_path / 'no'}: no such directory"


def test_problems_of_both_directories_are_reported(tmp_path: Path) -> None:
    assert len(problems_of((tmp_path / "one", tmp_path / "two"))) == 2


def test_a_missing_config_is_named(pair: Directories) -> None:
    path = pair[1] / "config.json"
    path.unlink()
    assert only_problem_of(pair).startswith(f"{path}: not a readable model config")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "5", '{"model_type": "no_such_type"}', "{}"],
    ids=["torn", "a list", "a number", "unknown type", "empty"],
)
def test_a_config_that_cannot_be_read_is_named(pair: Directories, content: str) -> None:
    path = pair[0] / "config.json"
    path.write_text(content)
    assert only_problem_of(pair).startswith(f"{path}: not a readable model config")


def test_a_config_with_a_value_of_the_wrong_kind_is_named(pair: Directories) -> None:
    edit_config(pair[0], num_hidden_layers="three")
    assert "config.json: not a readable model config" in only_problem_of(pair)


def test_remote_code_is_refused(pair: Directories) -> None:
    edit_config(pair[1], auto_map={"AutoModelForCausalLM": "modeling.Model"})
    problem = only_problem_of(pair)
    assert str(pair[1]) in problem
    assert "remote code (auto_map)" in problem


def test_missing_weights_are_named(pair: Directories) -> None:
    (pair[0] / "model.safetensors").unlink()
    assert only_problem_of(pair).startswith(f"{pair[0]}: no model.safetensors")


def test_pickled_weights_are_refused(pair: Directories) -> None:
    path = pair[0] / "model.safetensors"
    torch.save(load_file(path), pair[0] / "pytorch_model.bin")
    path.unlink()
    assert only_problem_of(pair).startswith(f"{pair[0]}: no model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=lambda keep: f"to {keep}")
def test_a_truncated_file_is_named(pair: Directories, keep: int) -> None:
    path = pair[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert only_problem_of(pair).startswith(f"{path}: not a readable safetensors file")


def test_a_corrupt_header_is_named(pair: Directories) -> None:
    path = pair[1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    assert only_problem_of(pair).startswith(f"{path}: not a readable safetensors file")


# --- Shards -------------------------------------------------------------------------------------


@pytest.fixture
def sharded(pair: Directories) -> Directories:
    for endpoint in pair:
        model = AutoModelForCausalLM.from_pretrained(endpoint)
        (endpoint / "model.safetensors").unlink()
        model.save_pretrained(endpoint, max_shard_size="40KB")
    return pair


def test_sharded_checkpoints_load(sharded: Directories, qwen3_pair: Directories) -> None:
    assert len(check_pair(*sharded).instruct.files) > 1
    assert check_pair(*sharded).instruct.tensors == check_pair(*qwen3_pair).instruct.tensors
    assert load(sharded).weight_bytes == load(qwen3_pair).weight_bytes


def test_a_missing_shard_is_named(sharded: Directories) -> None:
    shard = sorted(sharded[0].glob("model-*.safetensors"))[1]
    shard.unlink()
    assert only_problem_of(sharded).startswith(f"{shard}: listed in model.safetensors.index.json")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_shard_index_that_cannot_be_read_is_named(sharded: Directories, content: str) -> None:
    index = sharded[1] / "model.safetensors.index.json"
    index.write_text(content)
    assert only_problem_of(sharded).startswith(f"{index}: not a readable index")


# --- Differences --------------------------------------------------------------------------------


def test_different_architectures_are_refused(pair_of: PairOf) -> None:
    problems = problems_of((pair_of("qwen3")[0], pair_of("llama")[1]))
    assert "config model_type: instruct has 'qwen3', thinking has 'llama'" in problems


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ("rms_norm_eps", 1e-5),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 16),
        ("hidden_act", "gelu"),
        ("intermediate_size", 96),
        ("vocab_size", 95),
        ("tie_word_embeddings", False),
        ("attention_bias", True),
        ("some_key_of_the_future", 1),
    ],
)
def test_a_config_key_that_differs_is_named(pair: Directories, key: str, value: Any) -> None:
    edit_config(pair[1], **{key: value})
    assert any(problem.startswith(f"config {key}: ") for problem in problems_of(pair))


def test_windows_that_differ_are_named(pair_of: PairOf, tmp_path: Path) -> None:
    pair = copied(pair_of("mistral"), tmp_path)
    edit_config(pair[1], sliding_window=9)
    assert only_problem_of(pair) == "config sliding_window: instruct has 7, thinking has 9"


def test_layer_types_that_differ_are_named(pair_of: PairOf, tmp_path: Path) -> None:
    pair = copied(pair_of("gemma3_text"), tmp_path)
    edit_config(pair[1], layer_types=["full_attention"] * 3)
    assert any(problem.startswith("config layer_types: ") for problem in problems_of(pair))


def test_a_tensor_that_one_lacks_is_named(pair: Directories) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(pair[1], lambda tensors: tensors.pop(name))
    assert only_problem_of(pair) == f"tensor {name}: only in instruct"


def test_a_tensor_that_only_one_has_is_named(pair: Directories) -> None:
    edit_weights(pair[1], lambda tensors: tensors.update(extra=torch.ones(2)))
    assert only_problem_of(pair) == "tensor extra: only in thinking"


def test_a_tensor_of_another_shape_is_named(pair: Directories) -> None:
    name = "model.norm.weight"
    edit_weights(pair[1], lambda tensors: tensors.update({name: torch.ones(47)}))
    assert only_problem_of(pair) == f"tensor {name}: instruct has shape (48,), thinking (47,)"


def test_one_tied_and_one_untied_endpoint_are_refused(tmp_path: Path) -> None:
    tied, _ = write_pair(tmp_path / "tied", "qwen3", tie_word_embeddings=True)
    _, untied = write_pair(tmp_path / "untied", "qwen3", tie_word_embeddings=False)
    assert problems_of((tied, untied)) == [
        "config tie_word_embeddings: instruct has True, thinking has False",
        "tensor lm_head.weight: only in thinking",
    ]


def test_tokenizers_that_differ_are_refused(pair: Directories) -> None:
    write_tokenizer(pair[1], vocabulary=95)
    assert only_problem_of(pair) == "tokenizer.json model: differs between the endpoints"


def test_added_tokens_that_differ_are_refused(pair: Directories) -> None:
    edit_json(pair[1] / "tokenizer.json", added_tokens=[{"id": 5, "content": "<think>"}])
    assert only_problem_of(pair) == "tokenizer.json added_tokens: differs between the endpoints"


@pytest.mark.parametrize("content", [None, "{", "5"], ids=["missing", "torn", "a number"])
def test_a_tokenizer_that_cannot_be_read_is_named(pair: Directories, content: str | None) -> None:
    path = pair[0] / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    assert only_problem_of(pair).startswith(f"{path}: not a readable tokenizer")


def test_one_message_lists_every_mismatch(pair: Directories) -> None:
    edit_config(pair[1], rms_norm_eps=1e-5, head_dim=16)
    edit_weights(pair[1], lambda tensors: tensors.update(extra=torch.ones(2)))
    write_tokenizer(pair[1], vocabulary=95)
    assert [problem.split(":")[0] for problem in problems_of(pair)] == [
        "config head_dim",
        "config rms_norm_eps",
        "tensor extra",
        "tokenizer.json model",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": 128},
        {"eos_token_id": [2, 3]},
        {"bos_token_id": None},
        {"dtype": "bfloat16"},
        {"use_cache": False},
        {"transformers_version": "5.17.0"},
        {"initializer_range": 0.01},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_difference_that_changes_no_computation_is_accepted(
    pair: Directories, change: dict[str, Any]
) -> None:
    edit_config(pair[1], **change)
    check_pair(*pair)


def test_chat_templates_may_differ(pair: Directories) -> None:
    (pair[1] / "chat_template.jinja").write_text("<think>")
    check_pair(*pair)


def test_a_pair_has_the_shorter_context_of_its_endpoints(pair: Directories) -> None:
    edit_config(pair[1], max_position_embeddings=128)
    assert check_pair(*pair).max_positions == 128


# --- Parts that are not supported ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'dynamic'",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping (gemma2)"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types linear_attention"),
    ],
    ids=["dynamic rope", "quantized", "softcap", "linear attention"],
)
def test_a_part_that_is_not_supported_is_named(
    pair: Directories, change: dict[str, Any], named: str
) -> None:
    edit_config(*pair, **change)
    assert only_problem_of(pair).startswith(named)


def test_longrope_is_refused_by_name(pair_of: PairOf, tmp_path: Path) -> None:
    pair = copied(pair_of("phi3"), tmp_path)
    factors = [1.0] * 3  # half of the six rotated dimensions
    rope = {"rope_type": "longrope", "long_factor": factors, "short_factor": factors}
    theta = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    edit_config(*pair, rope_parameters={**rope, **theta}, original_max_position_embeddings=64)
    assert only_problem_of(pair).startswith("rope_type 'longrope'")


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("deepseek_v2", "multi-head latent attention (kv_lora_rank)"),
        ("deepseek_v3", "multi-head latent attention (kv_lora_rank)"),
        ("mamba", "state-space layers (model_type mamba)"),
        ("jamba", "state-space layers (model_type jamba)"),
        ("bamba", "state-space layers (model_type bamba)"),
        ("gemma2", "attn_logit_softcapping (gemma2)"),
        ("qwen3_next", "layer_types linear_attention"),
        ("gemma3", "text_config"),
        ("t5", "is_encoder_decoder"),
    ],
)
def test_a_family_that_is_not_supported_is_refused_by_name(
    pair: Directories, family: str, named: str
) -> None:
    for endpoint in pair:
        AutoConfig.for_model(family).save_pretrained(endpoint)
    assert any(problem.startswith(named) for problem in problems_of(pair))


def test_a_module_that_no_swap_covers_is_refused_by_name(tmp_path: Path) -> None:
    (problem,) = load_problems_of(write_pair(tmp_path, "gpt2"))
    named = "transformer.h.0.attn.c_attn.weight: parameters of Conv1D are not supported"
    assert problem == f"model_type gpt2: {named}"


def test_a_model_whose_forward_fails_on_packed_rows_is_refused_by_name(tmp_path: Path) -> None:
    (problem,) = load_problems_of(write_pair(tmp_path, "stablelm"))
    assert problem.startswith("model_type stablelm: ")


# --- Weights ------------------------------------------------------------------------------------


def test_a_tensor_that_both_lack_is_named(pair: Directories) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for endpoint in pair:
        edit_weights(endpoint, lambda tensors: tensors.pop(name))
    assert load_problems_of(pair) == [f"{pair[0]}: missing_keys: {name}"]


def test_a_tensor_that_the_model_does_not_have_is_named(pair: Directories) -> None:
    for endpoint in pair:
        edit_weights(endpoint, lambda tensors: tensors.update(extra=torch.ones(2)))
    assert load_problems_of(pair) == [f"{pair[0]}: unexpected_keys: extra"]


def test_a_tensor_whose_shape_does_not_fit_the_config_is_named(pair: Directories) -> None:
    name = "model.norm.weight"
    for endpoint in pair:
        edit_weights(endpoint, lambda tensors: tensors.update({name: torch.ones(47)}))
    assert any(name in problem for problem in load_problems_of(pair))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(pair: Directories, value: float) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    edit_weights(pair[1], lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    assert load_problems_of(pair) == [f"{pair[1]}: tensor {name} has values that are not finite"]


# --- Fingerprint --------------------------------------------------------------------------------


def fingerprint(pair: Directories, grid: float = GRID, delta_dtype: DeltaDtype = "none") -> str:
    return fingerprint_of(check_pair(*pair).identity(), grid, delta_dtype)


def test_the_fingerprint_does_not_depend_on_the_directory(
    pair: Directories, qwen3_pair: Directories
) -> None:
    assert fingerprint(pair) == fingerprint(qwen3_pair)


def test_the_fingerprint_changes_with_one_value_of_a_weight(
    pair: Directories, qwen3_pair: Directories
) -> None:
    edit_weights(pair[1], lambda tensors: tensors["model.norm.weight"][-1:].add_(1e-3))
    assert fingerprint(pair) != fingerprint(qwen3_pair)


def test_the_fingerprint_changes_with_the_grid(pair: Directories) -> None:
    assert fingerprint(pair, 0.01) != fingerprint(pair, 0.02)


def test_the_fingerprint_changes_with_the_format_of_the_delta(pair: Directories) -> None:
    kinds: tuple[DeltaDtype, ...] = ("none", "int8", "int4")
    assert len({fingerprint(pair, delta_dtype=kind) for kind in kinds}) == 3


def test_the_fingerprint_changes_if_the_endpoints_are_swapped(pair: Directories) -> None:
    assert fingerprint(pair) != fingerprint(pair[::-1])


def test_the_fingerprint_changes_with_the_config(pair: Directories) -> None:
    before = fingerprint(pair)
    edit_config(*pair, rms_norm_eps=1e-5)
    assert fingerprint(pair) != before
