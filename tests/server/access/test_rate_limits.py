import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.callers import Caller
from server.access.rate_limits import MANY, RateLimits
from server.wire.errors import RateLimited

ANN, BOB = Caller("ann", "ann"), Caller("bob", "bob")


class Clock:
    def __init__(self) -> None:
        self.now = 6_000_000.0  # a window's beginning

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.time", clock)
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def refused(limits: RateLimits, caller: Caller = ANN) -> int | None:
    """When to come back; None: welcome."""
    try:
        limits.take_request(caller)
    except RateLimited as error:
        return error.retry_after
    return None


def test_without_limits_everything_passes() -> None:
    limits = RateLimits(requests=None, tokens=None)
    limits.charge(ANN, 10**9)
    assert all(refused(limits) is None for _ in range(100))


def test_each_caller_has_requests_of_its_own(clock: Clock) -> None:
    limits = RateLimits(requests=3, tokens=None)
    assert [refused(limits) is None for _ in range(5)] == [True, True, True, False, False]
    assert refused(limits, BOB) is None


def test_a_caller_that_waits_as_long_as_it_should_is_accepted(clock: Clock) -> None:
    limits = RateLimits(requests=3, tokens=None)
    for _ in range(3):
        assert refused(limits) is None
    while (seconds := refused(limits)) is not None:
        assert 1 <= seconds <= 60
        clock.now += seconds
    assert clock.now <= 6_000_000 + 120


def test_a_caller_with_tokens_left_may_take_more_and_waits_for_them_to_come_back(
    clock: Clock,
) -> None:
    limits = RateLimits(requests=None, tokens=100)
    limits.charge(ANN, 99)
    assert refused(limits) is None
    limits.charge(ANN, 101)  # a minute's worth too much
    assert refused(limits, BOB) is None
    seconds = refused(limits)
    assert seconds == 61
    clock.now += seconds - 1.1
    assert refused(limits) is not None
    clock.now += 1.1
    assert refused(limits) is None


def test_nobody_has_to_wait_longer_than_clients_do(clock: Clock) -> None:
    limits = RateLimits(requests=None, tokens=100)
    limits.charge(ANN, 10_000)
    assert refused(limits) == 120


def test_callers_that_have_all_their_tokens_are_forgotten(clock: Clock) -> None:
    limits = RateLimits(requests=None, tokens=100)
    limits.charge(ANN, 10_000)
    for number in range(MANY):
        limits.charge(Caller(str(number)), 1)
    clock.now += 60
    limits.charge(BOB, 1)
    assert len(limits._full_at) == 2
    assert refused(limits) is not None


def test_a_request_without_tokens_left_counts_as_none(clock: Clock) -> None:
    limits = RateLimits(requests=2, tokens=10)
    limits.charge(ANN, 10)
    for _ in range(5):
        assert refused(limits) is not None
    clock.now += 121
    assert refused(limits) is None


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 500)), min_size=1, max_size=60))
def test_in_the_long_run_nobody_gets_more_than_the_rate(steps: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr("time.monotonic", clock)
        start, limits, taken, largest = clock.now, RateLimits(requests=None, tokens=100), 0, 0
        for seconds, tokens in steps:
            if refused(limits) is None:
                limits.charge(ANN, tokens)
                taken, largest = taken + tokens, max(largest, tokens)
            clock.now += seconds
        minutes = (clock.now - start) / 60
        assert taken <= 100 * (minutes + 1) + largest
