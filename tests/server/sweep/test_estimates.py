"""Estimates equal their definitions, and their intervals contain them."""

from collections.abc import Callable
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.sweep.estimates import estimate, pass_at, sampling_width, vote
from server.sweep.samples import Sample

MakeSample = Callable[..., Sample]

ANSWERS = st.tuples(st.sampled_from(["1", "2", "3", None]), st.integers(1, 50), st.booleans())
QUESTIONS = st.lists(st.lists(ANSWERS, min_size=1, max_size=5), min_size=1, max_size=5)


def samples_of(drawn: list[list[tuple[str | None, int, bool]]], make: MakeSample) -> list[Sample]:
    """Returns the samples of each question; the answer "1" is correct."""
    return [
        make(
            str(question),
            number,
            said=reading,
            correct=reading == "1",
            tokens=tokens + 5,
            reasoning_tokens=tokens,
            thought=thought,
        )
        for question, own in enumerate(drawn)
        for number, (reading, tokens, thought) in enumerate(own)
    ]


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(
    count: int, data: st.DataObject
) -> None:
    correct = data.draw(st.integers(0, count))
    k = data.draw(st.integers(1, count))
    draws = list(combinations([True] * correct + [False] * (count - correct), k))
    assert pass_at(k, count, correct) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    ("reading", "share"),
    [
        (["1", "1", "2"], 1.0),
        (["1", "2", "2"], 0.0),
        (["1", "2"], 0.5),
        (["1", "2", "3"], 1 / 3),
        (["2", None, None], 0.0),
        (["1", None, None], 1.0),
        ([None], 0.0),
    ],
)
def test_a_vote_counts_readings_and_a_tie_counts_its_share(
    reading: list[str | None], share: float, make_sample: MakeSample
) -> None:
    own = [make_sample(sample=n, said=it, correct=it == "1") for n, it in enumerate(reading)]
    assert vote(own) == pytest.approx(share)


@settings(max_examples=50)
@given(QUESTIONS)
def test_every_estimate_lies_in_its_interval_and_shares_lie_below_one(
    make_sample: MakeSample, drawn: list[list[tuple[str | None, int, bool]]]
) -> None:
    numbers = estimate(samples_of(drawn, make_sample), seed="s", votes=True, resamples=60)
    for name, it in numbers.items():
        assert it.low <= it.value <= it.high, name
        if "tokens" not in name:
            assert 0 <= it.low <= it.high <= 1 + 1e-9, name
    assert numbers["reasoning_tokens_p50"].value <= numbers["reasoning_tokens_p90"].value
    assert numbers["mean_at_k"].value <= numbers["pass_at_k"].value + 1e-9
    total = numbers["reasoning_tokens_mean"].value + numbers["answer_tokens_mean"].value
    assert numbers["tokens_mean"].value == pytest.approx(total)


@settings(max_examples=50)
@given(QUESTIONS, st.randoms(use_true_random=False))
def test_the_order_in_which_questions_have_their_samples_does_not_matter(
    make_sample: MakeSample, drawn: list[list[tuple[str | None, int, bool]]], random: Random
) -> None:
    samples = samples_of(drawn, make_sample)
    mixed = sorted(samples, key=lambda it: (it.question, random.random()))
    assert estimate(samples, seed="s", votes=True, resamples=20) == pytest.approx(
        estimate(mixed, seed="s", votes=True, resamples=20)
    )


def test_quantiles_are_values_of_samples(make_sample: MakeSample) -> None:
    samples = [make_sample("q", n, tokens=10 * n + 10) for n in range(10)]
    numbers = estimate(samples, seed="s", votes=True, resamples=1)
    assert (numbers["tokens_p50"].value, numbers["tokens_p90"].value) == (50, 90)


def test_a_question_counts_once_however_many_samples_it_has(make_sample: MakeSample) -> None:
    samples = [make_sample("a", n, correct=False) for n in range(9)] + [make_sample("b")]
    assert estimate(samples, seed="s", votes=True)["mean_at_k"].value == 0.5


def test_the_same_seed_gives_the_same_intervals(make_sample: MakeSample) -> None:
    samples = [make_sample(str(n), tokens=n * n + 4) for n in range(30)]
    one = estimate(samples, seed="s", votes=True)
    assert one == estimate(samples, seed="s", votes=True)
    assert one != estimate(samples, seed="t", votes=True)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(make_sample: MakeSample) -> None:
    random = Random(0)
    covered = 0
    for trial in range(100):
        samples = [make_sample(str(n), correct=random.random() < 0.6) for n in range(60)]
        it = estimate(samples, seed=str(trial), votes=False, resamples=200)["mean_at_k"]
        covered += it.low <= 0.6 <= it.high
    assert 88 <= covered <= 100


def test_without_votes_no_vote_is_estimated(make_sample: MakeSample) -> None:
    assert "vote_at_k" not in estimate([make_sample()], seed="s", votes=False)


def test_pass_at_powers_of_two_is_estimated_as_well_as_pass_at_k(make_sample: MakeSample) -> None:
    samples = [make_sample("q", n, correct=n == 0) for n in range(6)]
    numbers = estimate(samples, seed="s", votes=False, resamples=1)
    passes = {name: it.value for name, it in numbers.items() if name.startswith("pass")}
    assert passes == pytest.approx(
        {"pass_at_k": 1.0, "pass_at_1": 1 / 6, "pass_at_2": 2 / 6, "pass_at_4": 4 / 6}
    )


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=6), min_size=1, max_size=6))
def test_the_sampling_width_measures_the_spread_within_questions_only(
    values: list[list[bool]],
) -> None:
    width = sampling_width(values)
    assert (width == 0) == all(len(set(own)) == 1 for own in values)
    assert sampling_width([own * 4 for own in values]) <= width
