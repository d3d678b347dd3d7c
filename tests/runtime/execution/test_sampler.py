"""The sampler draws as plain references of one row at a time do.

A distribution is compared exactly. The sampler inverts a cumulative distribution at one uniform
number of the sequence's generator, so that a grid of such numbers must give every token as often as
its probability says, to within one step of the grid.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mi_runtime.device.transfer import Readback
from mi_runtime.execution import logits_processors, random_sampling
from mi_runtime.execution.sampler import Sampler
from mi_runtime.request import Dial, EngineRequest, SamplingParams, TokenLogprobs
from mi_runtime.scheduling.chunk import Sampled
from mi_runtime.scheduling.sequence import Sequence

VOCAB = 24
GRID = 800  # uniform numbers a distribution is compared at
PROMPT = (3, 3, 5)


class FixedRandom:
    """A random generator that always returns one number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def sequence(
    prompt: tuple[int, ...] = PROMPT, output: tuple[int, ...] = (), **params: Any
) -> Sequence:
    made = Sequence(EngineRequest("r", prompt, Dial(0.5), SamplingParams(**{"seed": 0, **params})))
    for token in output:
        made.append(token)
    return made


def sequence_at(uniform: float, **params: Any) -> Sequence:
    """Returns a sequence whose generator gives this uniform number."""
    made = sequence(**params)
    made.rng = FixedRandom(uniform)  # type: ignore[assignment]
    return made


def random_logits(rows: int = 1, seed: int = 0, vocabulary: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def sample(
    logits: Tensor, *sequences: Sequence, sampler: Sampler | None = None
) -> list[Sampled | None]:
    draw = (sampler or Sampler()).sample(logits, sequences)
    return draw.read(Readback(draw.tensors, logits.device).wait())


def tokens(logits: Tensor, *sequences: Sequence) -> list[int | None]:
    sampled = sample(logits, *sequences)
    return [None if one is None else one[0] for one in sampled]


def logprobs(logits: Tensor, one: Sequence) -> TokenLogprobs | None:
    (sampled,) = sample(logits, one)
    assert sampled is not None
    return sampled[1]


def drawn_distribution(logits: Tensor, **params: Any) -> Tensor:
    """Returns how often each token is drawn on a grid of uniform numbers, `[vocabulary]`."""
    sequences = [sequence_at((step + 0.5) / GRID, **params) for step in range(GRID)]
    drawn = torch.tensor(tokens(logits.expand(GRID, -1), *sequences))
    return torch.bincount(drawn, minlength=logits.shape[1]) / GRID


def expected_distribution(
    logits: Tensor, *, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> Tensor:
    """Returns the same distribution by the warpers of `transformers`, in their order."""
    no_ids = torch.zeros(1, 0)
    warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        logits = warper(no_ids, logits)
    return logits[0].softmax(0)


def assert_same_distribution(logits: Tensor, **params: Any) -> None:
    drawn, expected = drawn_distribution(logits, **params), expected_distribution(logits, **params)
    assert (drawn - expected).abs().max() <= 1.01 / GRID
    assert not (drawn > 0)[expected == 0].any(), "a token that was cut is drawn"


# --- One token ----------------------------------------------------------------------------------


def test_greedy_takes_the_best_token() -> None:
    logits = random_logits(5)
    sequences = [sequence(temperature=0) for _ in range(5)]
    assert tokens(logits, *sequences) == logits.argmax(1).tolist()


def test_greedy_takes_the_first_of_equally_good_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 4, 20]] = 1.0
    assert tokens(logits, sequence(temperature=0)) == [4]


def test_greedy_draws_no_random_number() -> None:
    one, other = sequence(temperature=0), sequence(temperature=0)
    tokens(random_logits(), one)
    assert one.rng.random() == other.rng.random()


def test_a_sampled_token_takes_exactly_one_random_number() -> None:
    one, other = sequence(top_k=4, top_p=0.9), sequence()
    tokens(random_logits(), one)
    other.rng.random()
    assert one.rng.random() == other.rng.random()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10 * VOCAB},
        {"top_p": 0.05},
        {"top_p": 0.8},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 8, "top_p": 0.7},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.08, "temperature": 1.4},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_requested_distribution(params: dict[str, Any]) -> None:
    assert_same_distribution(random_logits(), **params)


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(0.1, 1),
    min_p=st.floats(0, 0.5),
)
@settings(max_examples=settings.default.max_examples // 4)
def test_any_combination_of_cuts_gives_the_distribution_of_transformers(
    seed: int, **params: Any
) -> None:
    assert_same_distribution(random_logits(seed=seed), **params)


@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 30.0]),
    coarse=st.booleans(),
    group=st.sampled_from([1, 7, 64, 500]),
)
@settings(max_examples=settings.default.max_examples // 4)
def test_searching_finds_the_same_top_p_threshold_as_sorting(
    seed: int, temperature: float, coarse: bool, group: int
) -> None:
    """Coarse logits have many equal values; at a low temperature most tokens have no mass."""
    top_p = torch.tensor([2**-24, 0.1, 0.5, 0.9, 0.999, 1 - 2**-20, 1 - 2**-24]).unsqueeze(1)
    logits = random_logits(len(top_p), seed, vocabulary=997)
    logits = (logits.round() if coarse else logits) / temperature
    assert_found_as_sorted(logits.softmax(1), top_p, group)


def assert_found_as_sorted(probabilities: Tensor, top_p: Tensor, group: int) -> None:
    all_of_them = probabilities.shape[1]
    every = torch.full_like(top_p, all_of_them)
    by_sorting = random_sampling._least_of_ranked(probabilities, every, top_p, all_of_them)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_sampling, "GROUP", group)
        by_search = random_sampling._least_by_search(probabilities, top_p)
    assert torch.equal(by_search, by_sorting)


def test_searching_finds_the_same_threshold_in_a_large_vocabulary() -> None:
    top_p = torch.tensor([[0.8], [0.99]])
    logits = random_logits(2, vocabulary=151_936)
    assert_found_as_sorted(logits.softmax(1), top_p, random_sampling.GROUP)


@pytest.mark.parametrize("params", [{"top_p": 0.8}, {"top_p": 0.95, "min_p": 0.03}], ids=str)
def test_a_searched_threshold_gives_the_requested_distribution(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_sampling, "GROUP", 7)
    assert_same_distribution(random_logits(), **params)


def test_the_least_and_the_greatest_uniform_number_draw_possible_tokens() -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, [5, 9]] = 0.0
    logits = logits.clamp(min=-1e4)  # probability 0 before, between and after them
    for cut in ({}, {"top_p": 0.99}):
        assert tokens(logits, sequence_at(0.0, **cut)) == [5]
        assert tokens(logits, sequence_at(math.nextafter(1, 0), **cut)) == [9]


def test_equally_probable_tokens_are_kept_or_cut_together() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = 2.0
    logits[0, 3:6] = 1.0
    drawn = drawn_distribution(logits, top_k=4)
    assert drawn.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_seeds_reproduce_and_differ() -> None:
    logits = random_logits(vocabulary=1000) / 4

    def draw(seed: int) -> list[int | None]:
        one = sequence(seed=seed)
        return [tokens(logits, one)[0] for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


# --- What changes the logits --------------------------------------------------------------------


def changed_logits(logits: Tensor, one: Sequence) -> Tensor:
    """Returns the logits after penalties, bias and forbidden tokens, `[vocabulary]`."""
    sampling = one.request.sampling
    output = one.tokens[one.prompt_length :]
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB)
    row = logits[0].clone()
    seen = list({*one.request.prompt, *output})
    for token in seen:
        factor = sampling.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    row -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    for token, bias in sampling.logit_bias:
        row[token] += bias
    if one.forbids_ending:
        row[list(one.ending_token_ids)] = -torch.inf
    return row


def assert_draws_like_formula(logits: Tensor, **params: Any) -> None:
    drawn = drawn_distribution(logits, **params)
    expected = changed_logits(logits, sequence(**params)).softmax(0)
    assert (drawn - expected).abs().max() <= 1.01 / GRID


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"presence_penalty": -1.5},
        {"frequency_penalty": 0.8},
        {"frequency_penalty": -0.3},
        {"logit_bias": ((2, 3.0), (9, -100.0))},
        {"min_tokens": 9, "eos_token_ids": frozenset({1, 8}), "stop_token_ids": frozenset({4})},
        {
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.2,
            "logit_bias": ((5, 1.0),),
        },
    ],
    ids=lambda params: "+".join(params),
)
def test_penalties_bias_and_forbidden_ends_follow_their_formula(params: dict[str, Any]) -> None:
    assert_draws_like_formula(random_logits(), output=(7, 7, 8, 5), **params)


@given(
    output=st.lists(st.integers(0, VOCAB - 1), max_size=12).map(tuple),
    repetition_penalty=st.floats(0.5, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
)
@settings(max_examples=settings.default.max_examples // 4)
def test_any_penalties_follow_their_formula(**params: Any) -> None:
    assert_draws_like_formula(random_logits(seed=3), **params)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits, seen = random_logits(seed=5), torch.tensor([[*PROMPT, 7, 8]])
    expected = RepetitionPenaltyLogitsProcessor(1.9)(seen, logits.clone())[0].softmax(0)
    drawn = drawn_distribution(logits, output=(7, 8), repetition_penalty=1.9)
    assert (drawn - expected).abs().max() <= 1.01 / GRID


def test_penalties_grow_with_the_answer() -> None:
    """The counts are kept between steps, and survive a step without these tokens."""
    sampler, one = Sampler(), sequence(temperature=0, frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = torch.tensor([2.5, 1.9, 0.8])
    drawn = []
    for _ in range(5):
        (sampled,) = sample(logits, one, sampler=sampler)
        assert sampled is not None
        drawn.append(sampled[0])
        one.append(sampled[0])
    assert drawn == [0, 1, 0, 1, 2]  # 2.5, 1.9, 1.5, 0.9, 0.8


def test_biases_of_one_token_add_up() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 3.0
    assert tokens(logits, sequence(temperature=0, logit_bias=((8, 2.0), (8, 2.0)))) == [8]


def test_ends_are_allowed_after_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 1] = 50.0
    params: dict[str, Any] = {"temperature": 0, "min_tokens": 2, "eos_token_ids": frozenset({1})}
    assert tokens(logits, sequence(output=(7,), **params)) != [1]
    assert tokens(logits, sequence(output=(7, 7), **params)) == [1]


def test_an_end_token_outside_the_vocabulary_forbids_nothing() -> None:
    ends = frozenset({VOCAB, VOCAB + 100})
    logits = random_logits()
    drawn = tokens(logits, sequence(temperature=0, min_tokens=5, eos_token_ids=ends))
    assert drawn == logits.argmax(1).tolist()


def test_the_given_logits_are_not_changed() -> None:
    logits = random_logits()
    before = logits.clone()
    tokens(logits, sequence(repetition_penalty=2.0, logit_bias=((1, 5.0),), logprobs=3))
    assert torch.equal(logits, before)


# --- Log-probabilities --------------------------------------------------------------------------


def test_logprobs_are_those_of_the_models_own_logits() -> None:
    logits = random_logits()
    found = logprobs(
        logits,
        sequence(logprobs=4, temperature=0.3, logit_bias=((6, 100.0),), repetition_penalty=2.0),
    )
    expected = logits.log_softmax(1)[0]
    assert found is not None
    assert found.token == pytest.approx(expected[6].item())
    best = sorted(range(VOCAB), key=lambda token: -expected[token].item())[:4]
    assert [token for token, _ in found.top] == best
    assert [value for _, value in found.top] == pytest.approx(expected[best].tolist())


def test_without_the_parameter_there_are_no_logprobs() -> None:
    assert logprobs(random_logits(), sequence()) is None


def test_zero_alternatives_give_the_token_alone() -> None:
    found = logprobs(random_logits(), sequence(logprobs=0))
    assert found is not None
    assert found.top == ()


def test_more_alternatives_than_tokens_give_all_tokens() -> None:
    found = logprobs(random_logits(), sequence(logprobs=VOCAB + 5))
    assert found is not None
    assert len(found.top) == VOCAB


# --- Rows of one batch --------------------------------------------------------------------------

any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 7]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((4, 2.0),)]),
    min_tokens=st.sampled_from([0, 5]),
    eos_token_ids=st.just(frozenset({0, 2})),
    seed=st.integers(0, 9),
    logprobs=st.sampled_from([None, 0, 3, 9]),
)


def with_params(params: SamplingParams) -> Sequence:
    made = Sequence(EngineRequest("r", PROMPT, Dial(0.5), params))
    made.append(9)
    return made


@given(
    batch=st.lists(any_params, min_size=2, max_size=5),
    seed=st.integers(0, 99),
    coarse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    group=st.sampled_from([64, 1024]),
)
def test_a_row_gives_the_same_token_alone_and_in_any_batch(
    batch: list[SamplingParams], seed: int, coarse: bool, dtype: torch.dtype, group: int
) -> None:
    """Coarse logits have many equal values, as bf16 ones do, whose order must not matter."""
    logits = random_logits(len(batch), seed, vocabulary=200)
    logits = (logits.round() if coarse else logits).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_sampling, "GROUP", group)
        together = sample(logits, *map(with_params, batch))
        for row, params in enumerate(batch):
            alone = sample(logits[row : row + 1], with_params(params))
            assert together[row] == alone[0]


def test_slices_of_rows_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(15, vocabulary=200)
    penalized = {"repetition_penalty": 1.5, "frequency_penalty": 0.5}
    kinds: list[dict[str, Any]] = [{}, {"top_k": 5}, penalized, {"min_p": 0.1}, {"top_p": 0.7}]
    batch = [SamplingParams(seed=row, **kinds[row % len(kinds)]) for row in range(15)]
    at_once = tokens(logits, *map(with_params, batch))
    monkeypatch.setattr(random_sampling, "SLICE", 2)
    monkeypatch.setattr(logits_processors, "SLICE", 2)
    assert tokens(logits, *map(with_params, batch)) == at_once


def test_sums_of_probabilities_are_the_same_in_any_order() -> None:
    """On a GPU, the order of a row's sum depends on the number of rows."""
    probabilities = random_logits(3, vocabulary=5000).softmax(1)
    shuffled = probabilities[:, torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    totals, least = [], []
    for one in (probabilities, shuffled):
        totals.append(random_sampling._mass(one).cumsum(1)[:, -1])
        least.append(random_sampling._least_by_search(one, torch.full((3, 1), 0.9)))
    assert torch.equal(*totals)
    assert torch.equal(*least)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_nan_or_infinity_gets_no_token_and_changes_no_other_row(value: float) -> None:
    logits = random_logits(3)
    expected = tokens(logits, *(sequence(seed=row, top_k=4) for row in range(3)))
    logits[1, 7] = value
    drawn = tokens(logits, *(sequence(seed=row, top_k=4) for row in range(3)))
    assert drawn == [expected[0], None, expected[2]]


# --- Extremes: legal parameters never harm the batch --------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-46, 5e-324])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 3}], ids=str)
def test_a_tiny_temperature_is_greedy(temperature: float, cut: dict[str, Any]) -> None:
    """At 1e-38, the divided logits overflowed, and the token lay outside the vocabulary."""
    logits = random_logits(2) * 10
    sequences = [sequence(temperature=temperature, **cut) for _ in range(2)]
    assert tokens(logits, *sequences) == logits.argmax(1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": ((3, math.inf),)},
        {"logit_bias": ((3, math.nan),)},
        {"frequency_penalty": 1e39, "output": (5,)},
        {"min_tokens": 2, "eos_token_ids": frozenset(range(VOCAB))},
    ],
    ids=["infinite bias", "NaN bias", "overflowing penalty", "all forbidden"],
)
def test_a_row_without_a_possible_token_changes_no_other_row(
    params: dict[str, Any], temperature: float
) -> None:
    logits = random_logits(2)
    params = {**params, "temperature": temperature}
    drawn = tokens(logits, sequence(**params), sequence(temperature=0))
    assert drawn[1] == logits[1].argmax()
    assert drawn[0] is None or 0 <= drawn[0] < VOCAB
