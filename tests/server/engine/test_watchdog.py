"""The watchdog reports an engine that makes no progress for several checks, and no other."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from server.engine.watchdog import CHECKS, Traffic, Watchdog

START = Traffic(received=5, queued=3, sent=3)


def test_an_engine_without_reports_hangs_after_some_checks() -> None:
    watchdog = Watchdog(START)
    assert [watchdog.check(START) for _ in range(CHECKS + 1)] == [False] * CHECKS + [True]


def test_a_single_report_starts_the_count_again() -> None:
    watchdog = Watchdog(START)
    for received in range(6, 40):
        for _ in range(CHECKS + 1):
            assert not watchdog.check(replace(START, received=received))


def test_an_engine_that_reports_but_does_not_read_hangs_as_well() -> None:
    watchdog = Watchdog(START)
    checks = [
        watchdog.check(Traffic(received=5 + i, queued=9, sent=3)) for i in range(1, CHECKS + 2)
    ]
    assert checks[-1]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.booleans())))
def test_an_engine_that_reports_and_reads_never_hangs(moves: list[tuple[int, int, bool]]) -> None:
    watchdog, now = Watchdog(START), START
    for reports, commands, read in moves:
        sent = now.queued if read or now.queued > now.sent else now.sent
        now = Traffic(now.received + reports, now.queued + commands, sent)
        assert not watchdog.check(now)
