"""Gives the expected numbers: plain `transformers` on a checkpoint merged offline in fp32."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


@cache
def endpoint(directory: Path, implementation: str = "eager") -> Any:
    """Returns the model of one checkpoint in fp32; all tests share it."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=implementation
    )
    return model.eval().requires_grad_(False)


@cache
def merged(instruct: Path, thinking: Path, value: float, dtype: torch.dtype = torch.float32) -> Any:
    """Returns a plain model with Θ(λ), computed from both state dicts in fp32 and rounded once.

    All tests share it, so a test that changes it must copy it first.
    """
    low, high = endpoint(instruct).state_dict(), endpoint(thinking).state_dict()
    model = AutoModelForCausalLM.from_pretrained(instruct, dtype=dtype, attn_implementation="eager")
    blend = {
        name: torch.lerp(tensor, high[name], value) if tensor.is_floating_point() else tensor
        for name, tensor in low.items()
    }
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in blend.items()})
    return model.eval().requires_grad_(False)


def name_of_cache(model: Any) -> str:
    """Returns the name of `forward`'s cache argument, which `transformers` 5.24 changed."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@torch.inference_mode()
def logits(model: Any, tokens: list[int]) -> Tensor:
    """Returns the logits of one complete sequence, `[tokens, vocabulary]` in fp32."""
    out: Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    return out


def assert_greedy(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Asserts that `answer` is the greedy continuation of `prompt`.

    One forward is enough: every token must be the best one after all tokens before it. Returns the
    logits that the tokens were chosen by, `[tokens of the answer, vocabulary]`.
    """
    chosen_by = logits(model, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
    assert answer == chosen_by.argmax(1).tolist()
    return chosen_by


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Returns the greedy continuation of a prompt, of `new_tokens` tokens."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def forget_all() -> None:
    """Frees the models."""
    endpoint.cache_clear()
    merged.cache_clear()
