"""Every caller has a quota of requests and of tokens a minute, which refills as time passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.callers import Caller
from server.access.rate_limits import MANY, RateLimits
from server.wire.errors import RateLimited
from tests.server.clock import Clock

ANN, BOB = Caller("ann", "ann"), Caller("bob", "bob")


WINDOW_START = 6_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Returns a clock that replaces the system's."""
    clock = Clock(WINDOW_START)
    monkeypatch.setattr("time.time", clock)
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def seconds_to_wait(limits: RateLimits, caller: Caller = ANN) -> int | None:
    """Returns the seconds after which to try again, or None if the request is accepted."""
    try:
        limits.take_request(caller)
    except RateLimited as error:
        return error.retry_after
    return None


def test_without_limits_every_request_is_accepted() -> None:
    limits = RateLimits(requests=None, tokens=None)
    limits.charge(ANN, 10**9)
    assert all(seconds_to_wait(limits) is None for _ in range(100))


@pytest.mark.usefixtures("clock")
def test_each_caller_has_a_quota_of_its_own() -> None:
    limits = RateLimits(requests=3, tokens=None)
    assert [seconds_to_wait(limits) is None for _ in range(5)] == [True, True, True, False, False]
    assert seconds_to_wait(limits, BOB) is None


def test_a_caller_that_waits_until_retry_after_is_accepted(clock: Clock) -> None:
    limits = RateLimits(requests=3, tokens=None)
    for _ in range(3):
        assert seconds_to_wait(limits) is None
    while (seconds := seconds_to_wait(limits)) is not None:
        assert 1 <= seconds <= 60
        clock.now += seconds
    assert clock.now <= WINDOW_START + 120


def test_a_caller_may_overdraw_its_tokens_once_and_then_waits_for_the_refill(
    clock: Clock,
) -> None:
    limits = RateLimits(requests=None, tokens=100)
    limits.charge(ANN, 99)
    assert seconds_to_wait(limits) is None
    limits.charge(ANN, 101)  # a minute's worth too much
    assert seconds_to_wait(limits, BOB) is None
    seconds = seconds_to_wait(limits)
    assert seconds == 61
    clock.now += seconds - 1.1
    assert seconds_to_wait(limits) is not None
    clock.now += 1.1
    assert seconds_to_wait(limits) is None


@pytest.mark.usefixtures("clock")
def test_retry_after_is_at_most_two_minutes() -> None:
    limits = RateLimits(requests=None, tokens=100)
    limits.charge(ANN, 10_000)
    assert seconds_to_wait(limits) == 120


def test_callers_with_a_full_quota_are_forgotten(clock: Clock) -> None:
    limits = RateLimits(requests=None, tokens=100)
    limits.charge(ANN, 10_000)
    for number in range(MANY):
        limits.charge(Caller(str(number)), 1)
    clock.now += 60
    limits.charge(BOB, 1)
    assert len(limits._full_at) == 2
    assert seconds_to_wait(limits) is not None


def test_a_request_refused_for_its_tokens_is_not_counted_as_a_request(clock: Clock) -> None:
    limits = RateLimits(requests=2, tokens=10)
    limits.charge(ANN, 10)
    for _ in range(5):
        assert seconds_to_wait(limits) is not None
    clock.now += 121
    assert seconds_to_wait(limits) is None


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 500)), min_size=1, max_size=60))
def test_over_time_no_caller_gets_more_tokens_than_its_rate(steps: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(WINDOW_START)
        patch.setattr("time.monotonic", clock)
        start, limits, taken, largest = clock.now, RateLimits(requests=None, tokens=100), 0, 0
        for seconds, tokens in steps:
            if seconds_to_wait(limits) is None:
                limits.charge(ANN, tokens)
                taken, largest = taken + tokens, max(largest, tokens)
            clock.now += seconds
        minutes = (clock.now - start) / 60
        assert taken <= 100 * (minutes + 1) + largest
