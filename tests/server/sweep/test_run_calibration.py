"""Samples become the measurements of a calibration's plan, and then a profile."""

from collections.abc import Callable

import pytest

from server.routing.profiles import Source
from server.sweep.curves import measure
from server.sweep.grid import Decoding, Setting, curves_of
from server.sweep.http_client import ServedPair
from server.sweep.run_calibration import LEAST_QUESTIONS, calibrated_profile, measured_so_far
from server.sweep.samples import Sample
from server.sweep.tasks import Question, Task

MakeSample = Callable[..., Sample]
PAIR = ServedPair("pair", "abc", "I", "T", layers=6)


def questions_of(kind: str, count: int) -> list[Question]:
    return [Question(f"{kind}{n}", ({"role": "user", "content": "?"},), "7", kind)
            for n in range(count)]  # fmt: skip


def test_samples_of_a_round_that_was_cut_off_do_not_count_yet(
    setting: Setting, make_sample: MakeSample
) -> None:
    samples = [make_sample("q", n, correct=n < 2) for n in range(5)]
    (measured,) = measured_so_far(samples, {setting: 2})
    assert (measured.samples, measured.score, measured.width) == (2, 1.0, 0.0)
    (measured,) = measured_so_far(samples, {setting: 4})
    assert (measured.samples, measured.score) == (4, 0.5)
    assert measured.width > 0.5


def test_measurements_are_in_order_of_lambda(make_sample: MakeSample) -> None:
    settings = [Setting(value, "all", Decoding(0.7, 1.0)) for value in (1, 0, 0.5)]
    samples = [make_sample("q", n, setting=it.label) for it in settings for n in range(2)]
    measured = measured_so_far(samples, dict.fromkeys(settings, 2))
    assert [it.reasoning_lambda for it in measured] == [0, 0.5, 1]
    assert measured_so_far([], {}) == []


def test_a_profile_has_the_default_and_every_class_with_enough_questions(
    make_sample: MakeSample,
) -> None:
    task = Task(
        "t", (*questions_of("big", LEAST_QUESTIONS), *questions_of("small", LEAST_QUESTIONS - 1))
    )
    curves = curves_of([0, 1], ["all"], [0.7], [1.0])
    samples = [
        make_sample(
            question.id,
            n,
            setting=setting.label,
            correct=n == 0,
            thought=setting.reasoning_lambda == 1,
            reasoning_tokens=n,
            tokens=n + 5,
        )
        for setting in curves[0]
        for question in task.questions
        for n in range(2)
    ]
    reports = measure(samples, curves, task, seed=0, votes=True)
    source = Source(description="d", command="mi-server calibrate")
    profile = calibrated_profile(reports, PAIR, name="n", think_threshold=0.2, source=source)
    assert list(profile.classes) == ["default", "big"]
    assert (profile.pair.identity, profile.pair.instruct, profile.pair.thinking) == (
        "abc",
        "I",
        "T",
    )
    assert (profile.name, profile.think_threshold, profile.source) == ("n", 0.2, source)
    low, high = profile.classes["big"].points
    assert (low.reasoning_lambda, high.reasoning_lambda) == (0, 1)
    assert (low.think_rate, high.think_rate) == (0, 1)
    assert (high.score, high.answer_tokens, high.samples) == (0.5, 5, 2 * LEAST_QUESTIONS)
    lengths = high.reasoning_tokens
    assert (lengths.mean, lengths.p50, lengths.p90) == (0.5, 0, 1)
    assert high.score_interval == pytest.approx((0.5, 0.5))
