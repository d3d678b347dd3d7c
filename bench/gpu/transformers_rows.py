"""Measures `transformers` on the same card with the same random model, at one λ.

Continuous batching runs with its default page size, a cache sized for the workload, and the
engine's default of tokens in a step. It chooses its attention itself: `flash_attn` if that is
installed, and otherwise torch's, for which it captures no CUDA graphs and runs its steps
synchronously. `generate` runs with a static cache and with the compilation that it does on a GPU,
which takes minutes.
"""

import time
from statistics import median

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from bench.engine import Peer
from bench.gpu.bounds import answer_work, decode_work, way_of
from bench.gpu.cases import Case, Scale
from bench.gpu.engine_rows import Measured, workload
from bench.measuring.device import synchronize
from bench.models.random_pair import Place, random_endpoint
from bench.models.shapes import Shape

PAGE = 256  # tokens: its default, and what its decoding by flash attention needs
LONG = 5.0  # seconds: a round this long is measured once
MERGED = way_of("static", one_lambda=True)


class Batching:
    """Measures continuous batching."""

    def __init__(self, shape: Shape, place: Place, scale: Scale) -> None:
        logging.set_verbosity_error()
        # Torch 2.11 prefers cuDNN, which plans for each shape, and each step has a new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
        _, prompt, self._answer = scale.answers
        self._shape = shape
        self._model = random_endpoint(shape, place)
        self._peer = Peer(workload(prompt, self._answer), self._model, (PAGE,))

    def measure(self, case: Case) -> Measured:
        attention = self._model.config._attn_implementation  # until it is closed
        tokens = case.sequences * self._answer
        seconds: list[float] = []
        try:
            while len(seconds) < 2 or (len(seconds) < 3 and seconds[-1] < LONG):
                seconds.append(tokens / self._peer.batch(seed=len(seconds)).both)
        finally:
            self._peer.close()  # its thread would outlive this process
        work = answer_work(self._shape, MERGED, case.sequences, case.tokens, self._answer)
        facts = {"page_size": self._peer.page_size, "attention": attention}
        return Measured(tuple(seconds[1:]), tokens, work, facts)


class Generate:
    """Measures `generate` on one batch, whose prefill is timed separately and subtracted."""

    def __init__(self, shape: Shape, place: Place, scale: Scale) -> None:
        logging.set_verbosity_error()
        self._shape, self._place = shape, place
        self._answer = scale.answers[2]
        self._model = random_endpoint(shape, place)

    def measure(self, case: Case) -> Measured:
        started = time.perf_counter()
        self._seconds(case, self._answer)
        compiling = time.perf_counter() - started
        complete = [self._seconds(case, self._answer) for _ in range(3)]
        # Last, because it uses another cache.
        prefill = median(self._seconds(case, 1) for _ in range(3))
        work = decode_work(self._shape, MERGED, case.sequences, case.tokens + self._answer / 2)
        return Measured(
            tuple((one - prefill) / (self._answer - 1) for one in complete),
            case.sequences,
            work,
            {"first_run_seconds": compiling, "prefill_seconds": prefill},
        )

    def _seconds(self, case: Case, new_tokens: int) -> float:
        size, device = (case.sequences, case.tokens), self._place.device
        ids = torch.randint(16, 300, size, device=device)
        settings = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )
        synchronize(device)
        started = time.perf_counter()
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        synchronize(device)
        assert out.shape[1] == case.tokens + new_tokens
        return time.perf_counter() - started
