from hypothesis import given
from hypothesis import strategies as st

from server.engine.retry_after import Pace


def test_an_unknown_pace_says_a_second() -> None:
    assert Pace().seconds_for(50, now=10.0) == 1


def test_a_queue_takes_as_long_as_its_requests_took_before() -> None:
    pace = Pace()
    for second in range(10):
        pace.ended(float(second))
    assert pace.seconds_for(20, now=10.0) == 20


def test_old_ends_are_forgotten() -> None:
    pace = Pace()
    for second in range(10):
        pace.ended(float(second))
    assert pace.seconds_for(20, now=1000.0) == 1


@given(st.lists(st.floats(0, 10)), st.integers(1, 2000))
def test_more_requests_never_take_less_time(gaps: list[float], requests: int) -> None:
    pace, now = Pace(), 0.0
    for gap in gaps:
        now += gap
        pace.ended(now)
    assert 0 <= pace.seconds_for(requests, now) <= pace.seconds_for(requests + 1, now)
