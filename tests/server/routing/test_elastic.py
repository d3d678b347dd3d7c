"""Elastic routing turns on under load, and off again only after a while and well below it."""

from hypothesis import given
from hypothesis import strategies as st

from server.routing.elastic import ElasticLimits, ElasticSwitch, Pressure
from tests.server.clock import Clock

LIMITS = ElasticLimits(waiting=8, kv_usage=0.8, release=0.5, dwell=5.0)
CALM, BETWEEN, HIGH = Pressure(0, 0.0), Pressure(6, 0.6), Pressure(8, 0.0)


def test_a_queue_or_a_full_cache_is_load() -> None:
    for pressure in (Pressure(8, 0.0), Pressure(0, 0.8), Pressure(900, 1.0)):
        assert ElasticSwitch(LIMITS, Clock()).update(pressure)
    for pressure in (CALM, Pressure(7, 0.79)):
        assert not ElasticSwitch(LIMITS, Clock()).update(pressure)


def test_load_is_over_only_once_queue_and_cache_are_well_below_their_limits() -> None:
    clock = Clock()
    elastic = ElasticSwitch(LIMITS, clock)
    elastic.update(HIGH)
    clock.now += 100
    for pressure in (BETWEEN, Pressure(5, 0.0), Pressure(0, 0.41)):
        assert elastic.update(pressure)
    assert not elastic.update(Pressure(4, 0.4))


def test_elastic_routing_does_not_switch_within_the_dwell_time() -> None:
    clock = Clock()
    elastic = ElasticSwitch(LIMITS, clock)
    assert elastic.update(HIGH)
    clock.now += 4.9
    assert elastic.update(CALM)
    clock.now += 0.2
    assert not elastic.update(CALM)
    clock.now += 4.9
    assert not elastic.update(HIGH)
    clock.now += 0.2
    assert elastic.update(HIGH)


PRESSURES = st.builds(Pressure, st.integers(0, 20), st.floats(0, 1))


@given(st.lists(st.tuples(st.floats(0, 10), PRESSURES)))
def test_two_switches_are_at_least_a_dwell_time_apart(steps: list[tuple[float, Pressure]]) -> None:
    clock = Clock()
    elastic = ElasticSwitch(LIMITS, clock)
    changed = None
    for seconds, pressure in steps:
        clock.now += seconds
        before, after = elastic.active, elastic.update(pressure)
        if before == after:
            continue
        assert changed is None or clock.now - changed >= LIMITS.dwell
        changed = clock.now
        limit = 1.0 if after else LIMITS.release
        at_queue, at_cache = limit * LIMITS.waiting, limit * LIMITS.kv_usage
        if after:
            assert pressure.waiting >= at_queue or pressure.kv_usage >= at_cache
        else:
            assert pressure.waiting <= at_queue
            assert pressure.kv_usage <= at_cache


@given(st.lists(st.tuples(st.floats(0, 10), PRESSURES, PRESSURES)))
def test_active_under_predicts_update_without_side_effects(
    steps: list[tuple[float, Pressure, Pressure]],
) -> None:
    clock = Clock()
    elastic, untouched = ElasticSwitch(LIMITS, clock), ElasticSwitch(LIMITS, clock)
    for seconds, seen, pressure in steps:
        clock.now += seconds
        elastic.active_under(seen)
        expected = elastic.active_under(pressure)
        assert elastic.update(pressure) is untouched.update(pressure) is expected


@given(st.lists(PRESSURES))
def test_after_the_dwell_time_only_the_current_pressure_decides(
    before: list[Pressure],
) -> None:
    clock = Clock()
    elastic = ElasticSwitch(LIMITS, clock)
    for pressure in before:
        elastic.update(pressure)
    for pressure, expected in ((HIGH, True), (CALM, False)):
        clock.now += LIMITS.dwell
        assert elastic.update(pressure) is expected
