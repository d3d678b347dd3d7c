"""Budget and effort choose λ from an unmodified `openai` client to the engine on the embedded pair.

The expected numbers are read from the server's profile, which may be measured again.
"""

import re
from typing import Any

import openai
import pytest

from tests.contract.conftest import ServerProcess

QUESTION = "a=6,b=a-2,c=b+6,d=c-3. d?"
EFFORTS = ["minimal", "low", "medium", "high", "xhigh", "max"]


def ask(client: Any, *, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"temperature": 0, "model": "pair", "max_tokens": 200} | fields
    messages = [{"role": "user", "content": QUESTION}]
    return client.chat.completions.create(messages=messages, extra_body=extra, **fields)


def reasoning_tokens(answer: Any) -> int:
    tokens: int = answer.usage.completion_tokens_details.reasoning_tokens
    return tokens


@pytest.fixture(scope="module")
def curve(real_server: ServerProcess) -> Any:
    """Returns the default class as `GET /v1/profiles` shows it."""
    return real_server.get("/v1/profiles").json()["classes"]["default"]


def best_score(curve: Any, budget: float) -> float:
    """Returns the best measured score on the front whose p90 is within the budget."""
    front = [it for it in curve["points"] if it["on_front"]]
    return max((it["score"] for it in front if it["router"]["p90"] <= budget), default=0.0)


def test_the_embedded_pair_has_its_measured_profile(real_server: ServerProcess, curve: Any) -> None:
    profile = real_server.get("/v1/profiles").json()
    assert profile["measured"] is True
    assert profile["name"] != "neutral"
    assert {it["router"]["p90_source"] for it in curve["points"]} == {"measured"}
    assert sum(it["on_front"] for it in curve["points"]) >= 2


@pytest.mark.parametrize("effort", ["none", *EFFORTS])
def test_a_named_effort_is_mapped_by_the_profile(
    client: openai.OpenAI, curve: Any, effort: str
) -> None:
    answer = ask(client, reasoning_effort=effort)
    assert answer.routing["reasoning_lambda"] == curve["efforts"][effort]
    assert answer.routing["source"] == "effort"


def test_more_effort_never_means_less_expected_reasoning(client: openai.OpenAI) -> None:
    expected = [
        ask(client, reasoning_effort=effort, max_tokens=1).routing["expected_reasoning_tokens"]
        for effort in EFFORTS
    ]
    assert expected == sorted(expected)
    assert reasoning_tokens(ask(client, reasoning_effort="max")) > 0
    assert reasoning_tokens(ask(client, reasoning_effort="none")) == 0


def test_a_float_effort_and_openrouters_form_mean_the_same(client: openai.OpenAI) -> None:
    native, number, nested = (
        ask(client, reasoning_effort="medium"),
        ask(client, extra={"reasoning_effort": 0.5}),
        ask(client, extra={"reasoning": {"effort": "medium"}}),
    )
    assert native.routing == number.routing == nested.routing


@pytest.mark.parametrize(
    "extra",
    [
        {"thinking_token_budget": 12},
        {"thinking_budget": 12},
        {"thinking": {"type": "enabled", "budget_tokens": 12}},
        {"reasoning": {"max_tokens": 12}},
    ],
)
def test_a_budget_under_any_name_chooses_lambda_and_is_a_cap(
    client: openai.OpenAI, extra: dict[str, Any]
) -> None:
    answer = ask(client, extra=extra)
    assert (answer.routing["source"], answer.routing["cap"]) == ("budget", 12)
    assert answer.routing["expected_reasoning_tokens"] <= 12
    assert reasoning_tokens(answer) <= 12


def test_a_larger_budget_never_runs_at_a_lower_measured_score(
    client: openai.OpenAI, curve: Any
) -> None:
    scores = {it["lambda"]: it["score"] for it in curve["points"]}
    last = 0.0
    for budget in (0, 10, 30, 60, 90, 200, 2000):
        routing = ask(client, max_tokens=1, extra={"thinking_budget": budget}).routing
        value = routing["reasoning_lambda"]
        below = max(it for it in scores if it <= value)
        above = min(it for it in scores if it >= value)
        # Between two points the score is on the line between theirs.
        assert max(scores[below], scores[above]) >= max(best_score(curve, budget), last) - 1e-9
        last = min(scores[below], scores[above])


def test_a_budget_of_minus_one_is_no_budget(client: openai.OpenAI) -> None:
    routing = ask(client, extra={"thinking_budget": -1}, max_tokens=1).routing
    assert (routing["source"], "cap" in routing) == ("default", False)


@pytest.mark.parametrize(
    "extra",
    [
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"thinking": {"type": "disabled"}},
        {"reasoning": {"enabled": False}},
    ],
)
def test_every_switch_turns_thinking_off(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    answer = ask(client, extra=extra)
    assert answer.routing["reasoning_lambda"] == 0.0
    assert answer.routing["source"] == "enable_thinking"
    assert reasoning_tokens(answer) == 0


def test_enable_thinking_runs_at_the_servers_default(client: openai.OpenAI) -> None:
    on, default = ask(client, extra={"enable_thinking": True}), ask(client)
    assert on.routing == default.routing | {"source": "enable_thinking"}
    assert reasoning_tokens(on) > 0


def test_excluded_reasoning_is_generated_and_not_shown(client: openai.OpenAI) -> None:
    answer = ask(client, extra={"reasoning": {"effort": "max", "exclude": True}})
    assert reasoning_tokens(answer) > 0
    assert not hasattr(answer.choices[0].message, "reasoning_content")


def test_an_explicit_lambda_overrides_the_effort_and_a_budget_caps_it(
    client: openai.OpenAI,
) -> None:
    answer = ask(client, model="pair@1", reasoning_effort="low", extra={"thinking_budget": 7})
    reported = {"reasoning_lambda": 1.0, "source": "model", "cap": 7, "forced_close": True}
    assert reported.items() <= answer.routing.items()
    assert reasoning_tokens(answer) == 7


def test_an_unknown_class_is_routed_and_reported_as_the_default(client: openai.OpenAI) -> None:
    assert ask(client, extra={"routing_class": "poetry"}).routing["routing_class"] == "default"


def test_a_stream_reports_routing_in_first_and_last_chunk(client: openai.OpenAI) -> None:
    plain = ask(client, reasoning_effort="high")
    chunks = list(ask(client, reasoning_effort="high", stream=True))
    reported = [index for index, it in enumerate(chunks) if getattr(it, "routing", None)]
    assert reported == [0, len(chunks) - 1]
    assert all(chunks[index].routing == plain.routing for index in reported)


def test_the_response_header_has_the_lambda(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="pair",
        messages=[{"role": "user", "content": QUESTION}],
        reasoning_effort="none",
        max_tokens=1,
    )
    assert raw.headers["X-Reasoning-Lambda"] == "0"


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (
            {"reasoning_effort": "low", "extra": {"reasoning": {"effort": "high"}}},
            "reasoning.effort",
            "sets different efforts",
        ),
        (
            {"extra": {"thinking_budget": 1, "reasoning": {"max_tokens": 2}}},
            "reasoning.max_tokens",
            "different budgets",
        ),
        (
            {"reasoning_effort": "high", "extra": {"enable_thinking": False}},
            "reasoning_effort",
            "turns reasoning off",
        ),
        (
            {"extra": {"reasoning": {"effort": "high", "max_tokens": 2}}},
            "reasoning.max_tokens",
            "not both",
        ),
        ({"extra": {"chat_template_kwargs": {"x": 1}}}, "chat_template_kwargs.x", "Unknown"),
    ],
)
def test_a_contradiction_is_openais_bad_request_error(
    client: openai.OpenAI, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        ask(client, **fields)
    assert caught.value.param == param


def test_the_metrics_of_routing_count_each_request(
    client: openai.OpenAI, real_server: ServerProcess
) -> None:
    def value(pattern: str) -> float:
        text = real_server.get("/metrics").text
        return sum(float(it) for it in re.findall(rf"^mi_{pattern} (\S+)$", text, re.MULTILINE))

    names = [
        r'router_decisions_total\{.*source="effort".*\}',
        r"budget_used_ratio_count\{.*\}",
        r'observed_reasoning_tokens_count\{.*routing_class="default".*\}',
    ]
    before = [value(name) for name in names]
    ask(client, reasoning_effort="high")
    ask(client, model="pair@1", extra={"thinking_budget": 300})
    after = [value(name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1, 2]
    assert value(r"elastic_active\{.*\}") == 0
