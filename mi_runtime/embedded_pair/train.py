"""Trains the embedded pair from scratch: `python -m mi_runtime.embedded_pair.train --out DIR`.

A base model learns every format of the task (direct, brief, think). Two fine-tunes start from it:
Instruct keeps the formats without tags, and Thinking keeps the think block and re-checks more
often. Both stay close to the same base, which makes their interpolation work.

The loss of a batch is the weighted mean of the next-token cross entropies,
Σ w·ce / Σ w, where w is 0.2 for prompt tokens, 1 for answer tokens and more for the one digit
that a direct answer has to get right without writing anything down.

Cost: about 0.7 s per base step and eleven minutes in total, on one CPU thread per stage. It writes
`base`, `instruct` and `thinking` under DIR, in bf16, each loadable by plain `transformers`.

Rejected after measurement: a fine-tuning rate of 3e-4 (the transition becomes too soft); the full
rate for the embedding (the tied embedding then decides between the formats); at least one re-check
in every Thinking answer (its length is then flat beyond λ = 0.8); direct digits at weight 1 (they
stay at chance); 150 Instruct steps (the transition then starts below λ = 0.3, and training takes as
long, since Thinking trains at the same time); `torch.compile` (two minutes to start).
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AttentionInterface, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mi_runtime.embedded_pair.task import (
    LONGEST_CHAIN,
    Question,
    brief_answer,
    direct_answer,
    draw_question,
    think_answer,
)
from mi_runtime.embedded_pair.tokenizer import (
    LONGEST_CONTEXT,
    PAD,
    TURN_END,
    VOCABULARY_SIZE,
    build_tokenizer,
    prompt_text,
    save_tokenizer,
)

PROMPT_WEIGHT: Final = 0.2
DIRECT_DIGIT_WEIGHT: Final = 4.0
SYSTEM_MESSAGE_RATE: Final = 0.2
SYSTEM_MESSAGES: Final = (
    "You are a helpful assistant.",
    "You are in the chain.",
    "Answer the question.",
    "Answer the user, the sum is modulo 10.",
)
TAGLESS_LENGTH_WEIGHTS: Final = (3.0, 3.0, 2.0, 1.0, 1.0, 1.0)
THINK_LENGTH_WEIGHTS: Final = (1.0,) * LONGEST_CHAIN
LENGTH_STEP: Final = 32
"""Padded lengths are multiples of this, because CPU kernels are prepared once per shape."""
MICROBATCHES: Final = 4
"""A batch runs as this many microbatches of similar length, to avoid padding short answers."""
GRADIENT_NORM: Final = 1.0
FINAL_RATE: Final = 0.05
"""The learning rate at the end of the cosine, as a share of the full rate."""


@dataclass(frozen=True)
class Mixture:
    """How often each format is drawn, and how often a think block has 0, 1, 2 … re-checks."""

    direct: float
    brief: float
    think: float
    rechecks: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Stage:
    """One training run: its data, its number of steps, and its learning rates."""

    name: str
    seed: int
    mixture: Mixture
    steps: int
    warmup: int
    batch: int
    rate: float
    embedding_rate: float
    muon_rate: float | None = None
    """The rate of Muon for the hidden matrices; None trains them by AdamW at `rate`."""
    curriculum: int = 0
    """Steps over which the longest chain grows from 2 to 6."""

    def longest_chain(self, step: int) -> int:
        if step >= self.curriculum:
            return LONGEST_CHAIN
        return 2 + (LONGEST_CHAIN - 2) * step // self.curriculum

    def rate_factor(self, step: int) -> float:
        """Returns the rate factor of a step: linear warm-up, then a cosine down to `FINAL_RATE`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * progress)) / 2


def geometric(p: float, most: int) -> tuple[float, ...]:
    """Returns the weights of 0 … `most` re-checks, if each is followed by another with p."""
    return (*((1 - p) * p**count for count in range(most)), p**most)


def stages(seed: int = 0) -> tuple[Stage, Stage, Stage]:
    """Returns base, Instruct and Thinking, with seeds `seed`, `seed` + 11 and `seed` + 12."""
    base = Stage(
        name="base",
        seed=seed,
        mixture=Mixture(direct=0.40, brief=0.15, think=0.45, rechecks=(0.85, 0.12, 0.03)),
        steps=800,
        warmup=50,
        batch=64,
        rate=3e-3,
        embedding_rate=3e-3,
        muon_rate=0.02,
        curriculum=250,
    )
    instruct = Stage(
        name="instruct",
        seed=seed + 11,
        mixture=Mixture(direct=0.85, brief=0.15, think=0),
        steps=300,
        warmup=15,
        batch=32,
        rate=1e-3,
        embedding_rate=1e-4,
    )
    thinking = Stage(
        name="thinking",
        seed=seed + 12,
        mixture=Mixture(direct=0, brief=0, think=1, rechecks=geometric(0.4, 4)),
        steps=150,
        warmup=15,
        batch=32,
        rate=1e-3,
        embedding_rate=1e-4,
    )
    return base, instruct, thinking


@dataclass(frozen=True)
class Example:
    """One conversation: its token ids, and the loss weight of each."""

    tokens: list[int]
    weights: list[float]


class Examples:
    """Draws the training conversations of one stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._random = Random(stage.seed)
        self._tokenizer: Tokenizer = build_tokenizer()

    def batch(self, step: int) -> list[Example]:
        longest = self._stage.longest_chain(step)
        return [self._draw(longest) for _ in range(self._stage.batch)]

    def _draw(self, longest: int) -> Example:
        mixture = self._stage.mixture
        (form,) = self._random.choices(
            ("direct", "brief", "think"), (mixture.direct, mixture.brief, mixture.think)
        )
        lengths = THINK_LENGTH_WEIGHTS if form == "think" else TAGLESS_LENGTH_WEIGHTS
        question = draw_question(self._random, lengths[:longest])
        prompt = self._tokenizer.encode(prompt_text(question.text, self._system())).ids
        answer = self._tokenizer.encode(self._answer(form, question) + TURN_END).ids
        answer_weights = [1.0] * len(answer)
        if form == "direct":
            answer_weights[-2] = DIRECT_DIGIT_WEIGHT  # the token before the end of the turn
        return Example(prompt + answer, [PROMPT_WEIGHT] * len(prompt) + answer_weights)

    def _system(self) -> str | None:
        if self._random.random() < SYSTEM_MESSAGE_RATE:
            return self._random.choice(SYSTEM_MESSAGES)
        return None

    def _answer(self, form: str, question: Question) -> str:
        if form == "direct":
            return direct_answer(question)
        if form == "brief":
            return brief_answer(question)
        rechecks = self._stage.mixture.rechecks
        (count,) = self._random.choices(range(len(rechecks)), rechecks)
        return think_answer(question, count)


def padded(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Returns token ids and loss weights, both `[examples, length]`, padded right at weight 0."""
    longest = max(len(example.tokens) for example in examples)
    length = -(-longest // LENGTH_STEP) * LENGTH_STEP
    tokens = torch.full((len(examples), length), pad)
    weights = torch.zeros(len(examples), length)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        weights[row, : len(example.weights)] = torch.tensor(example.weights)
    return tokens, weights


def of_similar_length(examples: list[Example]) -> Iterator[list[Example]]:
    """Divides a batch into `MICROBATCHES` microbatches, shortest conversations first."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    size = -(-len(ordered) // MICROBATCHES)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def new_model(seed: int) -> PreTrainedModel:
    """Returns a randomly initialised Qwen3 of 1,222,656 parameters."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LONGEST_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return Qwen3ForCausalLM(config)


def optimizers(model: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """Returns AdamW, with a separate rate for the embedding, and Muon if the stage uses it."""
    hidden = {name: it for name, it in model.named_parameters() if "embed" not in name}
    embedding = [it for name, it in model.named_parameters() if name not in hidden]
    matrices = [it for it in hidden.values() if it.ndim == 2]
    norms = [it for it in hidden.values() if it.ndim != 2]
    rest = norms if stage.muon_rate is not None else norms + matrices
    adamw = torch.optim.AdamW(
        [
            {"params": embedding, "lr": stage.embedding_rate},
            {"params": rest, "lr": stage.rate},
        ],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    if stage.muon_rate is None:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=stage.muon_rate, momentum=0.95, weight_decay=0.01)
    return [adamw, muon]


def train(model: PreTrainedModel, stage: Stage, bar_row: int = 0) -> None:
    """Runs every step of the stage on `model`, in place."""
    examples = Examples(stage)
    updates = optimizers(model, stage)
    schedules = [torch.optim.lr_scheduler.LambdaLR(it, stage.rate_factor) for it in updates]
    model.set_attn_implementation(ATTENTION)
    model.train()
    bar = tqdm(range(stage.steps), desc=stage.name, position=bar_row, mininterval=2.0)
    for step in bar:
        loss = accumulate_gradients(model, examples.batch(step))
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for update, schedule in zip(updates, schedules, strict=True):
            update.step()
            schedule.step()
            update.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


def accumulate_gradients(model: PreTrainedModel, examples: list[Example]) -> float:
    """Adds the gradient of the batch's loss to the parameters, and returns the loss."""
    # Nothing predicts a conversation's first token, so its weight is not part of the mean.
    total_weight = sum(sum(example.weights[1:]) for example in examples)
    total = 0.0
    for microbatch in of_similar_length(examples):
        tokens, weights = padded(microbatch, model.config.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        entropies = functional.cross_entropy(
            logits.float().transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        loss = (entropies * weights[:, 1:]).sum() / total_weight
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _attention_in_fp32(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Computes causal attention outside autocast.

    Inputs are `[batch, heads, length, head size]`, the output `[batch, length, heads, head size]`.
    No mask is needed, because padding is on the right and has no weight.
    """
    with torch.autocast("cpu", enabled=False):
        mixed = functional.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            is_causal=True,
            scale=scaling,
            enable_gqa=True,
        )
    return mixed.transpose(1, 2).contiguous(), None


ATTENTION: Final = "causal_fp32"
AttentionInterface.register(ATTENTION, _attention_in_fp32)


def save(model: PreTrainedModel, directory: Path) -> None:
    """Writes bf16 weights, configuration, tokenizer and sampling defaults."""
    directory.mkdir(parents=True, exist_ok=True)
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory)
    sampling = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 1.0,
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id,
    }
    text = json.dumps(sampling, indent=2) + "\n"
    (directory / "generation_config.json").write_text(text, encoding="utf-8")


def train_base(stage: Stage, out: Path) -> None:
    """Trains the base model and writes it to `out`."""
    torch.set_num_threads(1)
    model = new_model(stage.seed)
    train(model, stage)
    save(model, out / stage.name)


def fine_tune(stage: Stage, out: Path, bar_row: int) -> None:
    """Trains one endpoint from the saved base, so that the deltas refer to what was saved."""
    torch.set_num_threads(1)
    model = Qwen3ForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    train(model, stage, bar_row)
    save(model, out / stage.name)


def train_pair(out: Path, seed: int = 0) -> None:
    """Trains base, Instruct and Thinking into `out`; the two fine-tunes run in parallel."""
    base, *endpoints = stages(seed)
    train_base(base, out)
    with ProcessPoolExecutor(len(endpoints), mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(fine_tune, stage, out, row) for row, stage in enumerate(endpoints)]
        for run in runs:
            run.result()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded pair from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the base (default: 0)")
    arguments = parser.parse_args()
    train_pair(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
