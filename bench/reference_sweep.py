"""Sweeps λ over the embedded pair with plain `transformers` on merged weights.

    python -m bench.reference_sweep [--pair DIR] [--questions 150] [--samples 8]

Merges Θ(λ) = λ·Θ_Thinking + (1−λ)·Θ_Instruct in fp32 from the bf16 checkpoints, asks every question
`samples` times, and prints a table: think rate (share of answers with `</think>`), mean generated
tokens (including the end of the turn), Mean@k, Pass@k (any of the k is correct) and the share of
answers that stopped by themselves. It uses nothing of the server, so the server's sweep must agree
with this table.

A batch runs as long as its longest answer, so questions of similar length share batches of 150
rows. Answers have at most `--longest` new tokens. A λ takes up to a minute on one CPU thread.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.embedded_pair.task import Question, draw_questions, is_correct, thought
from mi_runtime.embedded_pair.tokenizer import prompt_text

BATCH = 150


@dataclass(frozen=True)
class Answer:
    """One sampled answer: its text, and the number of tokens that the model generated for it."""

    text: str
    tokens: int
    stopped: bool


@dataclass(frozen=True)
class Row:
    """The results of the sweep at one λ."""

    think_rate: float
    mean_tokens: float
    mean_at_k: float
    pass_at_k: float
    stopped: float

    def __str__(self) -> str:
        shown = (self.think_rate, self.mean_at_k, self.pass_at_k, self.stopped)
        rate, mean, passed, stopped = (f"{value:.3f}" for value in shown)
        return f"{rate} | {self.mean_tokens:.1f} | {mean} | {passed} | {stopped}"


def merged(instruct: Path, thinking: Path, weight: float) -> PreTrainedModel:
    """Returns a model with the weights Θ(λ) in fp32."""
    model = Qwen3ForCausalLM.from_pretrained(instruct, dtype=torch.float32)
    other = Qwen3ForCausalLM.from_pretrained(thinking, dtype=torch.float32).state_dict()
    blend = {
        name: weight * other[name] + (1 - weight) * here
        for name, here in model.state_dict().items()
    }
    model.load_state_dict(blend)
    return model.eval()


def left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask, both [rows, longest]."""
    longest = max(map(len, rows))
    tokens = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens), torch.tensor(mask)


def ask(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[str],
    temperature: float,
    longest: int,
) -> list[Answer]:
    """Returns one answer to each prompt, in order. Temperature 0 is greedy."""
    sampling: dict[str, object] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(rows), BATCH):
        batch = by_length[start : start + BATCH]
        tokens, mask = left_padded([rows[index] for index in batch], model.config.pad_token_id)
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, max_new_tokens=longest, **sampling)
        for index, generated in zip(batch, out[:, tokens.shape[1] :].tolist(), strict=True):
            answers[index] = _answer(tokenizer, generated, model.config.eos_token_id)
    return [answers[index] for index in range(len(rows))]


def _answer(tokenizer: Tokenizer, generated: list[int], eos: int) -> Answer:
    stopped = eos in generated
    end = generated.index(eos) if stopped else len(generated)
    return Answer(tokenizer.decode(generated[:end]), end + stopped, stopped)


def measure(questions: list[Question], answers: list[Answer]) -> Row:
    """Summarizes answers, which are ordered by question, with the same number for each."""
    samples = len(answers) // len(questions)
    right = [
        is_correct(question, answer.text)
        for question, answer in zip(
            [question for question in questions for _ in range(samples)], answers, strict=True
        )
    ]
    solved = [any(right[start : start + samples]) for start in range(0, len(right), samples)]
    return Row(
        think_rate=sum(thought(answer.text) for answer in answers) / len(answers),
        mean_tokens=sum(answer.tokens for answer in answers) / len(answers),
        mean_at_k=sum(right) / len(right),
        pass_at_k=sum(solved) / len(solved),
        stopped=sum(answer.stopped for answer in answers) / len(answers),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Sweep λ over the embedded pair.")
    parser.add_argument("--pair", type=Path, help="holds instruct/ and thinking/ (default: ours)")
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--longest", type=int, default=512, help="new tokens per answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--system", help="a system message for every question")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    instruct = options.pair / "instruct" if options.pair else INSTRUCT_DIRECTORY
    thinking = options.pair / "thinking" if options.pair else THINKING_DIRECTORY
    tokenizer = Tokenizer.from_file(str(instruct / "tokenizer.json"))
    questions = draw_questions(Random(options.seed), options.questions)
    prompts = [
        prompt_text(question.text, options.system)
        for question in questions
        for _ in range(options.samples)
    ]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {options}")
    k = options.samples
    print(f"| λ | think rate | mean tokens | Mean@{k} | Pass@{k} | stopped | seconds |")
    print("|---|---|---|---|---|---|---|")
    for weight in options.weights:
        started = time.perf_counter()
        torch.manual_seed(options.seed)
        model = merged(instruct, thinking, weight)
        answers = ask(model, tokenizer, prompts, options.temperature, options.longest)
        row = measure(questions, answers)
        seconds = time.perf_counter() - started
        print(f"| {weight:g} | {row} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
