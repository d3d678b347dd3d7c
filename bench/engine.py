"""The engine alone: 32 requests, each at a λ of its own, against `transformers` at one λ.

    python -m bench.engine [--threads N] [--rounds N]

Rows, run in turn in one process on the embedded pair in fp32: the engine with 32 λ values, with
one λ, and at an endpoint; and continuous batching of `transformers` (sdpa) on a checkpoint merged
at one λ, started once, with the page size that was fastest in a trial. Tokens a second, prefill
and decode together.
"""

import argparse
import itertools
import time
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from bench.report import interleaved, publish
from bench.workload import EMBEDDED, NEW_TOKENS, REQUESTS, prompts, requests
from mi_runtime.engine import Engine
from mi_runtime.worker import default_threads

ONE_LAMBDA = 0.5
PAGE_SIZES = (16, 32, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()

    engine = Engine(EMBEDDED)
    peer = Peer(merged_model())
    seeds = itertools.count()
    rows = {
        "mi-server, 32 λ values": lambda: ours(engine, spread(), next(seeds)),
        "mi-server, one λ (0.5)": lambda: ours(engine, [ONE_LAMBDA] * REQUESTS, next(seeds)),
        "mi-server, λ = 0": lambda: ours(engine, [0.0] * REQUESTS, next(seeds)),
        f"transformers continuous batching, one λ, page {peer.page_size}": lambda: peer.run(
            prompts(next(seeds))
        ),
    }
    values = interleaved(rows, arguments.rounds)
    mixed, *_, theirs = (median(measured) for measured in values.values())
    publish("engine", "tokens/s", values, {"32 λ values / transformers at one λ": mixed / theirs})
    peer.close()


def spread() -> list[float]:
    return [index / (REQUESTS - 1) for index in range(REQUESTS)]


def ours(engine: Engine, lambdas: list[float], seed: int) -> float:
    work = requests(lambdas, seed)
    started = time.perf_counter()
    events = engine.generate(work)
    seconds = time.perf_counter() - started
    assert all(len(of_one) == NEW_TOKENS for of_one in events.values())
    return REQUESTS * NEW_TOKENS / seconds


def merged_model() -> Any:
    low, high = (
        AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        for directory in (EMBEDDED.instruct, EMBEDDED.thinking)
    )
    blend = {
        name: torch.lerp(tensor, high.state_dict()[name], ONE_LAMBDA)
        for name, tensor in low.state_dict().items()
    }
    low.load_state_dict(blend)
    return low.eval().requires_grad_(False)


class Peer:
    """Continuous batching of `transformers`, its manager kept running between rounds."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.page_size = max(PAGE_SIZES, key=self._trial)
        self._open(self.page_size)

    def run(self, work: list[list[int]]) -> float:
        started = time.perf_counter()
        self._manager.add_requests(work)
        tokens, finished = 0, 0
        while finished < len(work):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert result.error is None, result.error
                tokens += len(result.generated_tokens)
                finished += 1
        assert tokens == REQUESTS * NEW_TOKENS
        return tokens / (time.perf_counter() - started)

    def close(self) -> None:
        self._context.__exit__(None, None, None)

    def _trial(self, page_size: int) -> float:
        self._open(page_size)
        rate = max(self.run(prompts(1000)), self.run(prompts(1001)))
        self.close()
        print(f"trial: transformers continuous batching, page {page_size}: {rate:,.0f} tokens/s")
        return rate

    def _open(self, page_size: int) -> None:
        pages_each = -(-512 // page_size)
        self._context = self._model.continuous_batching_context_manager(
            generation_config=GenerationConfig(
                max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page_size,
                num_blocks=pages_each * REQUESTS,
                max_batch_tokens=2048,
                allow_block_sharing=False,
            ),
        )
        self._manager = self._context.__enter__()


if __name__ == "__main__":
    main()
