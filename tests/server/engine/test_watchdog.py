from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from server.engine.watchdog import LOOKS, Traffic, Watchdog

START = Traffic(received=5, given=3, sent=3)


def test_an_engine_without_a_word_hangs_after_some_looks() -> None:
    watchdog = Watchdog(START)
    assert [watchdog.look(START) for _ in range(LOOKS + 1)] == [False] * LOOKS + [True]


def test_a_single_word_starts_the_count_again() -> None:
    watchdog = Watchdog(START)
    for received in range(6, 40):
        for _ in range(LOOKS + 1):
            assert not watchdog.look(replace(START, received=received))


def test_an_engine_that_talks_but_does_not_listen_hangs_as_well() -> None:
    watchdog = Watchdog(START)
    looks = [watchdog.look(Traffic(received=5 + i, given=9, sent=3)) for i in range(1, LOOKS + 2)]
    assert looks[-1]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.booleans())))
def test_one_that_talks_and_listens_never_hangs(moves: list[tuple[int, int, bool]]) -> None:
    watchdog, now = Watchdog(START), START
    for said, asked, read in moves:
        sent = now.given if read or now.given > now.sent else now.sent
        now = Traffic(now.received + said, now.given + asked, sent)
        assert not watchdog.look(now)
