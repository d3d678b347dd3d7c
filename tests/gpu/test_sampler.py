"""Sampling on a GPU gives the same tokens in every batch, and waits for nothing."""

import torch
from torch import Tensor

from mi_runtime.execution import random_sampling
from mi_runtime.execution.sampler import Sampler
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.scheduling.sequence import Sequence
from tests.gpu.conftest import DEVICE, REHEARSED, on_a_gpu_only

VOCABULARY = 2_003 if REHEARSED else 151_936
ROWS = 32
SETTINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(logprobs=5),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=1.4, top_p=0.999, min_p=0.001),
    SamplingParams(top_k=20, top_p=0.95),
    SamplingParams(min_p=0.05),
    SamplingParams(top_p=0.8, repetition_penalty=1.2, logit_bias=((7, 2.0),)),
]


def logits_of(rows: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(rows, VOCABULARY, generator=generator, device=DEVICE)
    return (2 * logits).bfloat16()  # with many equals


def sequences(rows: range) -> tuple[Sequence, ...]:
    made = []
    for row in rows:
        one = Sequence(EngineRequest("r", (3, 3, 5), Dial(0.5), SETTINGS[row % len(SETTINGS)]))
        one.rng.seed(row)
        made.append(one)
    return tuple(made)


def test_a_row_samples_the_same_token_alone_and_in_a_batch() -> None:
    logits = logits_of(ROWS)
    together = Sampler().sample(logits, sequences(range(ROWS))).outcomes
    assert torch.equal(together, Sampler().sample(logits, sequences(range(ROWS))).outcomes)
    for row in range(ROWS):
        alone = Sampler().sample(logits[row : row + 1], sequences(range(row, row + 1))).outcomes
        assert torch.equal(together[row : row + 1], alone)


def test_the_least_probability_of_top_p_is_found_by_searching_as_by_sorting() -> None:
    top_p = torch.linspace(0.05, 0.9999, 8, device=DEVICE).unsqueeze(1)
    for temperature in (0.2, 1.0, 5.0):
        probabilities = (logits_of(8).float() / temperature).softmax(1)
        every = torch.full_like(top_p, VOCABULARY)
        by_sorting = random_sampling._least_of_ranked(probabilities, every, top_p, VOCABULARY)
        assert torch.equal(random_sampling._least_by_search(probabilities, top_p), by_sorting)


@on_a_gpu_only
def test_sampling_does_not_wait_for_the_device() -> None:
    logits, once, again = logits_of(ROWS), sequences(range(ROWS)), sequences(range(ROWS))
    Sampler().sample(logits, once)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        Sampler().sample(logits, again)
    finally:
        torch.cuda.set_sync_debug_mode("default")
