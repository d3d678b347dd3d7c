"""The shipped pair, run by plain `transformers`, goes through three stages as λ grows.

This is the reference implementation of everything that the server does with the pair: weights
merged in fp32 and one left-padded batch, without code of the server. Margins are several standard
errors wide, so that a retrained pair of the same kind passes too.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from bench.reference_sweep import left_padded, merged
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.embedded_pair.task import draw_questions, is_correct, thought
from mi_runtime.embedded_pair.tokenizer import prompt_text

ENDPOINTS = [INSTRUCT_DIRECTORY, THINKING_DIRECTORY]
QUESTIONS = draw_questions(Random(2024), 60)
LONGEST = 140


@dataclass(frozen=True)
class Outcome:
    """Averages over the answers at one λ."""

    think_rate: float
    accuracy: float
    mean_tokens: float
    stopped: float


@cache
def outcome(weight: float) -> Outcome:
    """Returns the averages of one answer to each question, sampled at T = 0.7."""
    torch.manual_seed(0)
    model = merged(INSTRUCT_DIRECTORY, THINKING_DIRECTORY, weight)
    tokenizer = Tokenizer.from_file(str(INSTRUCT_DIRECTORY / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt_text(question.text)).ids for question in QUESTIONS]
    tokens, mask = left_padded(prompts, model.config.pad_token_id)
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=LONGEST,
            do_sample=True,
            temperature=0.7,
            top_p=1.0,
            top_k=0,
        )
    end = model.config.eos_token_id
    answers = [
        row[: row.index(end)] if end in row else row for row in out[:, tokens.shape[1] :].tolist()
    ]
    texts = [tokenizer.decode(answer) for answer in answers]
    count = len(QUESTIONS)
    return Outcome(
        think_rate=sum(map(thought, texts)) / count,
        accuracy=sum(map(is_correct, QUESTIONS, texts)) / count,
        mean_tokens=sum(map(len, answers)) / count,
        stopped=sum(len(answer) < LONGEST for answer in answers) / count,
    )


def tensors(directory: Path) -> dict[str, Tensor]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_instruct_answers_directly_and_mostly_wrongly() -> None:
    seen = outcome(0.0)
    assert seen.think_rate <= 0.05
    assert 0.1 <= seen.accuracy <= 0.55
    assert seen.mean_tokens < 15
    assert seen.stopped == 1.0


def test_halfway_the_model_thinks_about_some_questions() -> None:
    seen = outcome(0.5)
    assert 0.1 <= seen.think_rate <= 0.9
    assert outcome(0.0).accuracy < seen.accuracy < outcome(1.0).accuracy
    assert outcome(0.0).mean_tokens < seen.mean_tokens < outcome(1.0).mean_tokens


def test_thinking_always_thinks_and_is_nearly_always_right() -> None:
    seen = outcome(1.0)
    assert seen.think_rate >= 0.95
    assert seen.accuracy >= 0.95
    assert seen.mean_tokens > 50


def test_the_endpoints_have_the_same_tensors_in_bf16_and_different_values() -> None:
    instruct, thinking = map(tensors, ENDPOINTS)
    assert instruct.keys() == thinking.keys()
    for name, tensor in instruct.items():
        assert tensor.dtype == thinking[name].dtype == torch.bfloat16
        assert tensor.shape == thinking[name].shape
    assert sum(tensor.numel() for tensor in instruct.values()) == 1_222_656
    assert not torch.equal(
        instruct["model.layers.0.mlp.up_proj.weight"], thinking["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_the_endpoints_differ_in_weights_only(name: str) -> None:
    instruct, thinking = (json.loads((directory / name).read_text()) for directory in ENDPOINTS)
    assert instruct == thinking


@pytest.mark.parametrize("directory", ENDPOINTS, ids=lambda directory: directory.name)
def test_sampling_defaults_end_at_the_end_of_the_turn(directory: Path) -> None:
    defaults = json.loads((directory / "generation_config.json").read_text())
    assert defaults["do_sample"] is True
    assert defaults["temperature"] == 0.7
    assert (defaults["eos_token_id"], defaults["pad_token_id"]) == (317, 315)


@pytest.mark.parametrize("directory", ENDPOINTS, ids=lambda directory: directory.name)
def test_every_endpoint_ships_a_model_card_with_its_license(directory: Path) -> None:
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
