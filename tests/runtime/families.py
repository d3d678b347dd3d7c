"""Writes random pairs of every supported model family, small enough to build in a test."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7, "layer_types": SLIDING, "query_pre_attn_scalar": 12},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": None},
    "olmo2": {},
    "olmo3": {"sliding_window": 7, "layer_types": SLIDING},
    "granite": {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "cohere2": {"sliding_window": 7, "layer_types": SLIDING},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"sliding_window": 7, "hidden_act": "gelu_pytorch_tanh"},
    "exaone4": {"sliding_window": 7, "layer_types": SLIDING},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "mixtral": {**EXPERTS, "sliding_window": None},
    "glm4_moe": {
        **EXPERTS,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        **EXPERTS,
        "sliding_window": 7,
        "layer_types": SLIDING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

# One of each kind of swap: tied, fused or biased matrices, routers and experts of every layout,
# windows, sinks.
OF_EACH_KIND = ("qwen3", "gemma3_text", "phi3", "starcoder2", "qwen2_moe", "glm4_moe", "gpt_oss")


def marks_of(family: str) -> list[Any]:
    """Returns the marks of a family: `long` if another one has the same kinds of module."""
    return [] if family in OF_EACH_KIND else [pytest.mark.long]


def write_pair(
    directory: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    apart: float | None = None,
    **changes: Any,
) -> tuple[Path, Path]:
    """Writes two random checkpoints of one family, and returns their directories.

    They are independent. With `apart`, the second lies that share of the way from the first to an
    independent one, as endpoints do that were tuned from one base.
    """
    endpoints = (directory / "instruct", directory / "thinking")
    for seed, endpoint in enumerate(endpoints):
        write_checkpoint(endpoint, family, seed, dtype=dtype, **changes)
    if apart is not None:
        low, high = (load_file(endpoint / "model.safetensors") for endpoint in endpoints)
        near = {name: torch.lerp(low[name], high[name], apart) for name in low}
        save_file(near, endpoints[1] / "model.safetensors", metadata={"format": "pt"})
    return endpoints


def write_checkpoint(
    directory: Path, family: str, seed: int, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> None:
    settings = {**SMALL, **FAMILIES.get(family, {}), **changes}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():  # norms and biases too: an untouched one would hide a bug
            noise = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.copy_(noise + 1 if "norm" in name and "weight" in name else noise)
    model.to(dtype).save_pretrained(directory)
    write_tokenizer(directory)


def write_tokenizer(directory: Path, vocabulary: int = VOCABULARY) -> None:
    """Writes a word-level tokenizer of `vocabulary` entries, which the pair check accepts."""
    words = {f"w{index}": index for index in range(vocabulary)}
    content = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}}
    (directory / "tokenizer.json").write_text(json.dumps(content))
