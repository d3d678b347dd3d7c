"""The routing policy turns budget, effort and load into the λ that a request runs at."""

from typing import Any

import pytest

from mi_runtime.request import Dial
from server.routing.profiles import Profile
from server.routing.reasoning_options import ReasoningOptions
from server.routing.requested_lambda import LambdaReader, RequestedDials
from server.routing.routing_decision import RoutingDecision
from server.routing.routing_policy import NEUTRAL, REBUILD_SECONDS, RoutingPolicy, RoutingSettings
from tests.server.clock import Clock
from tests.server.measured_profile import measured_profile

READER = LambdaReader("pair", step=0.01, default=0.8)
UNNAMED = READER.read(model="pair", body=None, header=None)


def policy(measured: Profile | None, **settings: Any) -> RoutingPolicy:
    given = {"default": 0.8, "step": 0.01, "think_threshold": 0.0} | settings
    return RoutingPolicy(measured, RoutingSettings(**given))


MEASURED, UNMEASURED = policy(measured_profile()), policy(None)


def summary(routing: RoutingDecision) -> tuple[float, str, float | None, int | None]:
    """Returns λ, its source, the expected reasoning tokens, and the cap."""
    (dial,) = routing.dials
    return dial.reasoning_lambda, routing.source, routing.expected, routing.cap


# --- with a profile ---


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, (0.8, "default", 400, None)),
        ({"thinks": True}, (0.8, "enable_thinking", 400, None)),
        ({"thinks": False}, (0.0, "enable_thinking", 0, None)),
        ({"effort": "none"}, (0.0, "effort", 0, None)),
        ({"effort": 0.0}, (0.0, "effort", 0, None)),
        ({"effort": "max"}, (0.8, "effort", 400, None)),
        ({"effort": 0.8}, (0.6, "effort", 200, None)),
        ({"budget": 600}, (0.8, "budget", 400, 600)),
        ({"budget": 450}, (0.7, "budget", 300, 450)),
        ({"budget": 300}, (0.6, "budget", 200, 300)),
        ({"budget": 199}, (0.0, "budget", 0, 199)),
        ({"budget": 0}, (0.0, "budget", 0, 0)),
        ({"budget": 10**6}, (0.8, "budget", 400, 10**6)),
        ({"budget": 300, "effort": "max", "thinks": True}, (0.6, "budget", 200, 300)),
        ({"effort": 0.8, "thinks": True}, (0.6, "effort", 200, None)),
        ({"effort": "none", "budget": 0}, (0.0, "effort", 0, 0)),
    ],
)
def test_the_first_option_that_is_given_decides(
    inputs: dict[str, Any], expected: tuple[float, str, float | None, int | None]
) -> None:
    assert summary(MEASURED.decide(UNNAMED, ReasoningOptions(**inputs))) == pytest.approx(expected)


@pytest.mark.parametrize("inputs", [{}, {"budget": 150}, {"effort": "low"}, {"thinks": False}])
def test_an_explicit_lambda_stays_and_a_budget_caps_it(inputs: dict[str, Any]) -> None:
    requested = READER.read(model="pair@0.6", body=None, header=None)
    routing = MEASURED.decide(requested, ReasoningOptions(**inputs))
    cap = inputs.get("budget")
    assert summary(routing) == (0.6, "model", 150 if cap else 200, cap)


def test_a_fan_out_and_a_lambda_by_groups_stay_without_an_expectation() -> None:
    for requested in (
        READER.read(model="pair", body=[0.2, 0.6], header=None),
        RequestedDials((Dial(0.6, (("head", 0.0),)),), "body"),
    ):
        routing = MEASURED.decide(requested, ReasoningOptions(budget=10))
        assert (routing.dials, routing.cap, routing.expected) == (requested.dials, 10, None)


def test_a_request_of_a_measured_class_is_routed_by_its_curve() -> None:
    inputs = ReasoningOptions(effort="max", routing_class="math")
    routing = MEASURED.decide(UNNAMED, inputs)
    assert (routing.routing_class, summary(routing)) == ("math", (0.9, "effort", 3000, None))


def test_a_request_of_an_unknown_class_is_routed_by_the_default_and_reported_so() -> None:
    inputs = ReasoningOptions(effort="max", routing_class="poetry")
    assert MEASURED.decide(UNNAMED, inputs).routing_class == "default"


def test_if_no_point_fits_the_budget_the_cheapest_one_runs_under_the_cap() -> None:
    routing = MEASURED.decide(UNNAMED, ReasoningOptions(budget=700, routing_class="math"))
    assert summary(routing) == (0.5, "budget", 700, 700)


def test_thinking_on_runs_at_the_default_only_if_the_default_thinks() -> None:
    never = policy(measured_profile(), default=0.2, think_threshold=0.3)
    assert summary(never.decide(UNNAMED, ReasoningOptions(thinks=True)))[0] == 0.45
    assert summary(never.decide(UNNAMED, ReasoningOptions()))[0] == 0.2


def test_on_a_coarse_grid_every_chosen_lambda_lies_on_it() -> None:
    coarse = policy(measured_profile(), step=0.2)
    for budget in range(0, 700, 50):
        (dial,) = coarse.decide(UNNAMED, ReasoningOptions(budget=budget)).dials
        assert dial.reasoning_lambda in (0.0, 0.4, 0.6, 0.8)


def test_the_answer_reports_the_routing_without_what_does_not_apply() -> None:
    routing = MEASURED.decide(UNNAMED, ReasoningOptions(budget=450))
    assert routing.body == {
        "reasoning_lambda": 0.7,
        "source": "budget",
        "profile": "measured",
        "routing_class": "default",
        "expected_reasoning_tokens": 300.0,
        "cap": 450,
    }


# --- without a profile ---


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, (0.8, "default", None, None)),
        ({"thinks": True}, (0.8, "enable_thinking", None, None)),
        ({"thinks": False}, (0.0, "enable_thinking", None, None)),
        ({"effort": "none"}, (0.0, "effort", None, None)),
        ({"effort": "medium"}, (0.5, "effort", None, None)),
        ({"effort": 0.37}, (0.37, "effort", None, None)),
        ({"budget": 50}, (0.8, "budget", None, 50)),
    ],
)
def test_without_a_profile_an_effort_is_a_lambda_and_a_budget_is_a_cap(
    inputs: dict[str, Any], expected: tuple[float, str, float | None, int | None]
) -> None:
    routing = UNMEASURED.decide(UNNAMED, ReasoningOptions(**inputs, routing_class="math"))
    assert summary(routing) == expected
    assert (routing.profile, routing.routing_class) == (NEUTRAL, "default")


def test_without_a_profile_load_changes_nothing() -> None:
    routing = UNMEASURED.decide(UNNAMED, ReasoningOptions(), under_load=True)
    assert summary(routing)[0] == 0.8
    assert not routing.elastic


# --- load ---

ELASTIC = policy(measured_profile(), elastic_effort=0.4)  # λ = 0.4, 100 tokens


@pytest.mark.parametrize(
    ("inputs", "value", "moved"),
    [
        ({}, 0.4, True),
        ({"thinks": True}, 0.4, True),
        ({"effort": "max"}, 0.4, True),
        ({"budget": 10**6}, 0.4, True),
        ({"effort": 0.4}, 0.4, False),
        ({"effort": 0.0}, 0.0, False),
        ({"budget": 10}, 0.0, False),
        ({"thinks": False}, 0.0, False),
        ({"effort": "none"}, 0.0, False),
    ],
)
def test_under_load_nothing_costs_more_than_the_operators_effort(
    inputs: dict[str, Any], value: float, moved: bool
) -> None:
    routing = ELASTIC.decide(UNNAMED, ReasoningOptions(**inputs), under_load=True)
    assert (routing.dials[0].reasoning_lambda, routing.elastic) == (value, moved)
    assert routing.cap == inputs.get("budget")
    assert routing.body.get("elastic") is (True if moved else None)


def test_under_load_an_explicit_lambda_stays() -> None:
    requested = READER.read(model="pair", body=1.0, header=None)
    routing = ELASTIC.decide(requested, ReasoningOptions(), under_load=True)
    assert (summary(routing)[0], routing.elastic) == (1.0, False)


def test_under_load_a_default_that_was_never_measured_moves() -> None:
    unknown = policy(measured_profile(), default=0.95, elastic_effort=1.0)
    routing = unknown.decide(UNNAMED, ReasoningOptions(routing_class="math"), under_load=True)
    assert (summary(routing)[0], routing.elastic) == (0.9, True)


def test_under_load_effort_none_stays_at_lambda_zero() -> None:
    """λ = 0 was not measured in this class, where the cheapest point is 0.5."""
    inputs = ReasoningOptions(effort="none", routing_class="math")
    assert summary(ELASTIC.decide(UNNAMED, inputs, under_load=True))[0] == 0.0


# --- adaptation ---


def adaptive_policy(clock: Clock, least: int | None) -> RoutingPolicy:
    settings = RoutingSettings(0.8, 0.01, 0.0, adapt_min_samples=least)
    return RoutingPolicy(measured_profile(), settings, clock)


def observe(policy: RoutingPolicy, value: float, count: int, tokens: int, cut: bool) -> None:
    for _ in range(count):
        policy.observed_lengths.add("default", value, tokens, cut=cut)


def lambda_for_300_tokens(policy: RoutingPolicy) -> float:
    return policy.decide(UNNAMED, ReasoningOptions(budget=300)).dials[0].reasoning_lambda


def test_observed_lengths_are_used_once_there_are_enough_and_the_table_is_rebuilt() -> None:
    clock = Clock()
    adaptive = adaptive_policy(clock, 20)
    observe(adaptive, 0.8, 19, 250, cut=False)
    clock.now += REBUILD_SECONDS
    assert lambda_for_300_tokens(adaptive) == 0.6
    observe(adaptive, 0.8, 1, 250, cut=False)
    assert lambda_for_300_tokens(adaptive) == 0.6
    clock.now += REBUILD_SECONDS
    assert lambda_for_300_tokens(adaptive) == 0.8
    routing = adaptive.decide(UNNAMED, ReasoningOptions())
    assert routing.expected == 250


def test_cut_blocks_do_not_lower_the_p90_of_a_lambda() -> None:
    clock = Clock()
    adaptive = adaptive_policy(clock, 20)
    observe(adaptive, 0.8, 17, 250, cut=False)
    observe(adaptive, 0.8, 3, 250, cut=True)
    clock.now += REBUILD_SECONDS
    assert lambda_for_300_tokens(adaptive) == 0.6  # the p90 lies among the cut ones


def test_without_adapt_observed_lengths_are_ignored() -> None:
    clock = Clock()
    steady = adaptive_policy(clock, None)
    observe(steady, 0.8, 100, 250, cut=False)
    clock.now += 10 * REBUILD_SECONDS
    assert lambda_for_300_tokens(steady) == 0.6
