"""All names of budget, effort and on or off mean the same, and contradictions are refused."""

from typing import Any

import pytest

from server.routing.reasoning_options import (
    EFFORT_SHARES,
    ReasoningOptions,
    budgets,
    read_reasoning_options,
)
from server.wire.errors import InvalidRequest
from tests.server.chat_bodies import parse


def read(**fields: Any) -> ReasoningOptions:
    return read_reasoning_options(parse(**fields))


def refusal(**fields: Any) -> InvalidRequest:
    """Returns the error that reading the options of these fields raises."""
    with pytest.raises(InvalidRequest) as caught:
        read(**fields)
    return caught.value


def enabled(budget: int) -> dict[str, Any]:
    return {"type": "enabled", "budget_tokens": budget}


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({}, None),
        ({"thinking_token_budget": 7}, 7),
        ({"thinking_token_budget": 0}, 0),
        ({"thinking_token_budget": -1}, None),
        ({"thinking_budget": 7}, 7),
        ({"thinking_budget": -1}, None),
        ({"thinking": enabled(7)}, 7),
        ({"thinking": enabled(-1)}, None),
        ({"reasoning": {"max_tokens": 7}}, 7),
        ({"reasoning": {"max_tokens": 7, "enabled": True}}, 7),
        ({"thinking_budget": 7, "thinking": enabled(7), "reasoning": {"max_tokens": 7}}, 7),
        ({"thinking_budget": -1, "thinking_token_budget": -1}, None),
    ],
)
def test_every_name_of_a_budget_means_the_same(fields: dict[str, Any], budget: int | None) -> None:
    assert read(**fields).budget == budget


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, None),
        ({"reasoning_effort": "low"}, 0.25),
        ({"reasoning": {"effort": "low"}}, 0.25),
        ({"reasoning_effort": 0.3}, 0.3),
        ({"reasoning_effort": 0}, 0.0),
        ({"reasoning_effort": 1}, 1.0),
        ({"reasoning_effort": "medium", "reasoning": {"effort": 0.5}}, 0.5),
        ({"reasoning_effort": "none"}, None),
        ({"reasoning_effort": None}, None),
    ],
)
def test_every_form_of_an_effort_is_a_share(fields: dict[str, Any], share: float | None) -> None:
    assert read(**fields).share == share


def test_the_named_efforts_rise_to_one() -> None:
    shares = [EFFORT_SHARES[name] for name in EFFORT_SHARES]
    assert shares == sorted(set(shares))
    assert (shares[0] > 0, shares[-1]) == (True, 1.0)


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, None),
        ({"enable_thinking": False}, False),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {}}, None),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"exclude": True}}, None),
        ({"enable_thinking": True, "reasoning": {"enabled": True}}, True),
    ],
)
def test_every_name_of_the_switch_means_the_same(
    fields: dict[str, Any], thinks: bool | None
) -> None:
    assert read(**fields).thinks is thinks


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"enable_thinking": False},
        {"enable_thinking": False, "reasoning_effort": "none", "thinking_budget": 0},
        {"thinking": {"type": "disabled"}, "thinking_token_budget": 0},
        {"enable_thinking": False, "thinking_budget": -1},
    ],
)
def test_effort_none_and_a_switch_turn_reasoning_off(fields: dict[str, Any]) -> None:
    assert read(**fields).off


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        (
            {"thinking_token_budget": 7, "thinking_budget": 8},
            "thinking_budget",
            "different budgets: 7 (`thinking_token_budget`), 8",
        ),
        (
            {"thinking_token_budget": 0, "thinking_budget": -1},
            "thinking_budget",
            "different budgets",
        ),
        (
            {"thinking": enabled(7), "reasoning": {"max_tokens": 8}},
            "reasoning.max_tokens",
            "different budgets",
        ),
        (
            {"reasoning_effort": "low", "reasoning": {"effort": "high"}},
            "reasoning.effort",
            "different efforts: low (`reasoning_effort`), high",
        ),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs.enable_thinking",
            "true (`enable_thinking`), false",
        ),
        (
            {"reasoning": {"effort": "low", "max_tokens": 5}},
            "reasoning.max_tokens",
            "`effort` or `max_tokens`, not both",
        ),
        (
            {"thinking": {"type": "adaptive", "budget_tokens": 5}},
            "thinking.budget_tokens",
            "allowed only with `thinking.type: enabled`",
        ),
        (
            {"enable_thinking": False, "thinking_budget": 5},
            "thinking_budget",
            "off (false (`enable_thinking`)) and asks for it (5 (`thinking_budget`))",
        ),
        ({"enable_thinking": False, "reasoning_effort": "low"}, "reasoning_effort", "turns"),
        ({"enable_thinking": False, "reasoning_effort": 0}, "reasoning_effort", "turns"),
        ({"enable_thinking": True, "reasoning_effort": "none"}, "enable_thinking", "turns"),
        ({"reasoning_effort": "none", "thinking_budget": 5}, "thinking_budget", "turns"),
        (
            {"thinking": {"type": "disabled", "budget_tokens": 0}},
            "thinking.budget_tokens",
            "allowed only with `thinking.type: enabled`",
        ),
        ({"thinking": {"type": "disabled"}, "thinking_budget": 5}, "thinking_budget", "turns"),
        ({"reasoning": {"enabled": False, "effort": "low"}}, "reasoning.effort", "turns"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_with_the_reason(
    fields: dict[str, Any], param: str, problem: str
) -> None:
    error = refusal(**fields)
    assert (error.status, error.param) == (400, param)
    assert problem in error.message


def test_an_effort_and_a_budget_do_not_conflict() -> None:
    inputs = read(reasoning_effort="low", thinking_budget=5, enable_thinking=True)
    assert (inputs.budget, inputs.effort, inputs.thinks) == (5, "low", True)


def test_budgets_are_listed_by_the_name_that_the_client_used() -> None:
    request = parse(thinking=enabled(3), reasoning={"max_tokens": 3})
    assert budgets(request) == {"thinking.budget_tokens": 3, "reasoning.max_tokens": 3}
