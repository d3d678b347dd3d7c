"""Compares the engine's ways to compute Θ(λ) with a checkpoint merged offline, on two pairs.

    python -m bench.engine [--pairs embedded,midsize] [--threads N] [--rounds N]

All rows run in turn in one process; results are medians over the rounds after a warm-up round.
Prefill is the time from submitting 32 prompts to the last one's first token; decode is the time
after that. Both are reported in tokens a second. Rows:

    a   the engine on a checkpoint merged at λ = 0.5, without any pair module
    b   one λ that is in use ("hot"): 0.5
    c   32 λ values, one for each request
    d   8 λ values, four requests each
    e   λ = 0, and λ = 1
    f   one request at a λ never used before: time to first token, compared with a hot λ
    g   `transformers` on the merged checkpoint: continuous batching at its best page size (started
        once), and `generate` on the 32 prompts as one batch
    h   8 λ values, four requests each, in eight merged engines in turn

The pairs are the embedded one in fp32, and a random one of Qwen3-0.6B's shapes in bf16.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from bench.measuring.folders import BUILD
from bench.measuring.publishing import publish
from bench.models.static_engine import StaticEngine, blended_config, write_merged
from bench.models.workloads import EMBEDDED_PAIR, REQUESTS, Pair, midsize_pair, prompts, requests
from mi_runtime.engine import Engine
from mi_runtime.worker import default_threads

HOT = 0.5
EIGHT = [0.06 + 0.125 * index for index in range(8)]
PAGE_SIZES = (16, 64, 256)
PAGE_SIZE = (  # renamed after transformers 5.17
    "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
)
PAIRS = {"embedded": lambda: EMBEDDED_PAIR, "midsize": midsize_pair}


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second."""

    prefill: float
    decode: float
    both: float  # new tokens divided by the complete time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", default="embedded,midsize")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in arguments.pairs.split(","):
        run(PAIRS[name](), arguments.rounds)


def run(pair: Pair, rounds: int) -> None:
    directory = write_merged(pair, HOT, BUILD / pair.name / "merged")
    engine = Engine(blended_config(pair))
    static = StaticEngine(directory, blended_config(pair))
    peer = Peer(pair, merged_model(pair, directory))
    seeds = itertools.count()
    spread = [(index + 0.5) / REQUESTS for index in range(REQUESTS)]
    eight = [value for value in EIGHT for _ in range(REQUESTS // len(EIGHT))]

    def ours(lambdas: list[float]) -> Callable[[], Speed]:
        return lambda: speed(engine, pair, lambdas, next(seeds))

    rows: dict[str, Callable[[], Speed]] = {
        "a static, merged at one λ": lambda: speed(static, pair, [HOT] * REQUESTS, next(seeds)),
        "b one hot λ": ours([HOT] * REQUESTS),
        "c 32 λ values": ours(spread),
        "d 8 λ values": ours(eight),
        "e λ = 0": ours([0.0] * REQUESTS),
        "e λ = 1": ours([1.0] * REQUESTS),
        f"g continuous batching, page {peer.page_size}": lambda: peer.batch(next(seeds)),
        "g generate": lambda: peer.generate(next(seeds)),
        "h eight merged engines in turn": lambda: in_turn(static, pair, next(seeds)),
    }
    speeds, first_tokens = measure(rows, engine, pair, rounds, seeds)
    peer.close()
    report(pair, speeds, first_tokens, engine)


def measure(
    rows: dict[str, Callable[[], Speed]],
    engine: Engine,
    pair: Pair,
    rounds: int,
    seeds: Iterator[int],
) -> tuple[dict[str, list[Speed]], dict[str, list[float]]]:
    """Runs every row in turn, `rounds` times after a warm-up round."""
    speeds: dict[str, list[Speed]] = {name: [] for name in rows}
    first: dict[str, list[float]] = {"f never-seen λ": [], "f hot λ": []}
    for index in range(rounds + 1):
        for name, row in rows.items():
            speed = row()
            print(f"{pair.name} {index}/{rounds} {name:<34} prefill {speed.prefill:>8,.0f}  "
                  f"decode {speed.decode:>8,.0f}  tokens/s", flush=True)  # fmt: skip
            speeds[name] += [speed] if index else []
        for number in range(5):
            unseen = HOT + 1e-4 * (1 + 5 * index + number)  # not on the grid of any other row
            pairs = (("f never-seen λ", unseen), ("f hot λ", HOT))
            for name, value in pairs if number % 2 else pairs[::-1]:
                seconds = first_token_seconds(engine, pair, value, next(seeds))
                first[name] += [seconds * 1e3] if index else []
    return speeds, first


def report(
    pair: Pair, speeds: dict[str, list[Speed]], first: dict[str, list[float]], engine: Engine
) -> None:
    tables = {
        f"{part} {name}": [getattr(one, part) for one in of_row]
        for part in ("prefill", "decode", "both")
        for name, of_row in speeds.items()
        if median(getattr(one, part) for one in of_row)
    }
    middle = {name: median(values) for name, values in tables.items()}
    row = {name.split()[0] + name.split()[1]: value for name, value in middle.items()}
    static = middle["decode a static, merged at one λ"]
    batching = next(value for name, value in middle.items() if "continuous" in name)
    publish(
        f"engine-{pair.name}",
        "tokens/s (f: ms)",
        {**tables, **first},
        {
            "b/a decode, one hot λ": middle["decode b one hot λ"] / static,
            "b/a prefill, one hot λ": row["prefillb"] / row["prefilla"],
            "c/a decode, 32 λ": middle["decode c 32 λ values"] / static,
            "d/h, 8 λ against eight engines": row["bothd"] / row["bothh"],
            "e/a decode, λ = 0": middle["decode e λ = 0"] / static,
            "e/a decode, λ = 1": middle["decode e λ = 1"] / static,
            "f, never-seen λ / hot λ": median(first["f never-seen λ"]) / median(first["f hot λ"]),
            "c / continuous batching at one λ": row["bothc"] / batching,
            "a / continuous batching at one λ": row["botha"] / batching,
        },
    )
    print(engine.stats())


def speed(engine: Engine, pair: Pair, lambdas: list[float], seed: int) -> Speed:
    work = requests(pair, lambdas, seed)
    for request in work:
        engine.submit(request)
    waiting = {request.request_id for request in work}
    new_tokens, started = 0, time.perf_counter()
    while waiting:
        events = engine.step()
        waiting -= {event.request_id for event in events}
        new_tokens += len(events)
    middle = time.perf_counter()
    decoded = 0
    while not engine.idle:
        decoded += len(engine.step())
    ended = time.perf_counter()
    assert new_tokens + decoded == len(work) * pair.new_tokens
    return Speed(
        prefill=len(work) * pair.prompt_tokens / (middle - started),
        decode=decoded / (ended - middle),
        both=(new_tokens + decoded) / (ended - started),
    )


def first_token_seconds(engine: Engine, pair: Pair, value: float, seed: int) -> float:
    (request,) = requests(pair, [value], seed)
    started = time.perf_counter()
    engine.submit(request)
    while not engine.step():
        pass
    seconds = time.perf_counter() - started
    engine.abort(request.request_id)
    return seconds


def in_turn(static: StaticEngine, pair: Pair, seed: int) -> Speed:
    """Runs one engine eight times, as eight engines with one λ each would run in turn."""
    parts = [
        speed(static, pair, [HOT] * (REQUESTS // len(EIGHT)), seed * 100 + index)
        for index in range(len(EIGHT))
    ]
    return Speed(*(
        len(parts) / sum(1 / getattr(part, name) for part in parts)
        for name in ("prefill", "decode", "both")
    ))  # fmt: skip


def merged_model(pair: Pair, directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, pair.dtype), attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


class Peer:
    """Runs `transformers` on a plain model. Continuous batching keeps running between rounds."""

    def __init__(self, pair: Pair, model: Any, page_sizes: tuple[int, ...] = PAGE_SIZES) -> None:
        self._pair, self._model = pair, model
        self._settings = GenerationConfig(
            max_new_tokens=pair.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        self.page_size = page_sizes[0] if len(page_sizes) == 1 else max(page_sizes, key=self._trial)
        self._open(self.page_size)

    def batch(self, seed: int) -> Speed:
        """Runs continuous batching, which does not separate prefill from decode."""
        work = prompts(self._pair, seed)
        started = time.perf_counter()
        self._manager.add_requests(work)
        tokens, finished = 0, 0
        while finished < len(work):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert result.error is None, result.error
                tokens += len(result.generated_tokens)
                finished += 1
            assert result is not None or self._manager.is_running(), "its thread has ended"
        assert tokens == REQUESTS * self._pair.new_tokens
        return Speed(0, 0, tokens / (time.perf_counter() - started))

    def generate(self, seed: int) -> Speed:
        ids = torch.tensor(prompts(self._pair, seed))
        started = time.perf_counter()
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=self._settings
        )
        tokens = (out.shape[1] - ids.shape[1]) * REQUESTS
        assert tokens == REQUESTS * self._pair.new_tokens
        return Speed(0, 0, tokens / (time.perf_counter() - started))

    def close(self) -> None:
        self._context.__exit__(None, None, None)

    def _trial(self, page_size: int) -> float:
        self._open(page_size)
        rate = max(self.batch(10_000 + turn).both for turn in range(2))
        self.close()
        print(f"trial: continuous batching, page {page_size}: {rate:,.0f} tokens/s")
        return rate

    def _open(self, page_size: int) -> None:
        length = self._pair.prompt_tokens + self._pair.new_tokens
        self._context = self._model.continuous_batching_context_manager(
            generation_config=self._settings,
            continuous_batching_config=ContinuousBatchingConfig(
                **{PAGE_SIZE: page_size},
                num_blocks=-(-2 * length // page_size) * REQUESTS,
                max_batch_tokens=2048,
                allow_block_sharing=False,
            ),
        )
        self._manager = self._context.__enter__()


if __name__ == "__main__":
    main()
