"""Makes random Qwen3 endpoints directly on a device, without files.

A model is constructed without memory and materialized on its device in its dtype, so that there is
never a copy in another one. Its parameters are drawn there, which takes a GPU a second. Thinking is
Instruct plus noise of a tenth of its scale.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from bench.models.shapes import Shape, Store
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.load import pair_up

SCALE = 0.02  # standard deviation of the weights
DIFFERENCE = 0.1  # standard deviation of the endpoints' difference, as a share of SCALE


@dataclass(frozen=True, slots=True)
class Place:
    """The device and dtype of models."""

    device: torch.device
    dtype: torch.dtype
    positions: int  # tokens of context


def config_of(shape: Shape, positions: int) -> Qwen3Config | Qwen3MoeConfig:
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": positions,
        "tie_word_embeddings": shape.tied,
        "eos_token_id": None,
    }
    if not shape.experts:
        return Qwen3Config(intermediate_size=shape.inner, **common)
    return Qwen3MoeConfig(
        intermediate_size=shape.inner,
        moe_intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        norm_topk_prob=True,
        **common,
    )


@torch.no_grad()
def random_endpoint(shape: Shape, place: Place, seed: int = 0) -> PreTrainedModel:
    model = _empty(shape, place)
    generator = torch.Generator(place.device).manual_seed(seed)
    for name, tensor in model.named_parameters():
        tensor.normal_(0.0, SCALE, generator=generator)
        if "norm" in name:
            tensor.add_(1)
    return model


@torch.no_grad()
def random_thinking(shape: Shape, instruct: PreTrainedModel, place: Place) -> PreTrainedModel:
    """Makes the Thinking endpoint on `place`, which may be on another device than `instruct`."""
    model = _empty(shape, place)
    generator = torch.Generator(instruct.device).manual_seed(1)
    own = dict(instruct.named_parameters())
    for name, tensor in model.named_parameters():
        noise = torch.empty_like(own[name]).normal_(0.0, SCALE * DIFFERENCE, generator=generator)
        tensor.copy_(noise.add_(own[name]))
    return model


def random_pair(shape: Shape, place: Place, store: Store) -> BlendedModel:
    """Makes a pair: both endpoints in full (`pair`), or Instruct and a delta in int8 or int4.

    In both cases both endpoints are on the device until they are paired.
    """
    instruct = random_endpoint(shape, place)
    thinking = random_thinking(shape, instruct, place)
    if store in ("int8", "int4"):
        return pair_up(instruct, thinking, "random", delta_dtype=store)
    return pair_up(instruct, thinking, "random")


def _empty(shape: Shape, place: Place) -> PreTrainedModel:
    """Makes a model with uninitialized parameters, and with the buffers of its config."""
    config = config_of(shape, place.positions)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=place.dtype)
    assert isinstance(model, PreTrainedModel)
    model.to_empty(device=place.device)
    model.tie_weights()  # because each was materialized separately
    assert not shape.tied or model.lm_head.weight is model.model.embed_tokens.weight
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(place.device)
    return model.eval().requires_grad_(False)
