"""The time to try again after is estimated from how many requests ended recently."""

from hypothesis import given
from hypothesis import strategies as st

from server.engine.retry_after import RetryAfter


def test_an_unknown_rate_gives_one_second() -> None:
    assert RetryAfter().estimate(50, now=10.0) == 1


def test_a_queue_takes_as_long_as_its_requests_took_before() -> None:
    recent = RetryAfter()
    for second in range(10):
        recent.note_end(float(second))
    assert recent.estimate(20, now=10.0) == 20


def test_old_ends_are_forgotten() -> None:
    recent = RetryAfter()
    for second in range(10):
        recent.note_end(float(second))
    assert recent.estimate(20, now=1000.0) == 1


@given(st.lists(st.floats(0, 10)), st.integers(1, 2000))
def test_more_requests_never_take_less_time(gaps: list[float], requests: int) -> None:
    recent, now = RetryAfter(), 0.0
    for gap in gaps:
        now += gap
        recent.note_end(now)
    assert 0 <= recent.estimate(requests, now) <= recent.estimate(requests + 1, now)
