"""Over HTTP, budget, effort and load choose λ, and the profile and observed lengths are shown."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.server.chat_requests import (
    MakeClient,
    WaitUntil,
    chat,
    check_error,
    metric,
    stream_events,
)
from tests.server.measured_profile import measured_profile


@pytest.fixture
def profiled(make_client: MakeClient, tmp_path: Path) -> MakeClient:
    """Opens clients of a pair that has a profile: `profiled(elastic=True)`."""
    path = tmp_path / "profile.json"
    measured_profile().save(path)

    def make(*worker_flags: str, **settings: object) -> TestClient:
        return make_client(*worker_flags, profile=str(path), **settings)

    return make


def routed(client: TestClient, **fields: Any) -> dict[str, Any]:
    """Returns the routing that an answer reports, after checking that its λ reached the engine."""
    response = chat(client, "lambda", **fields)
    assert response.status_code == 200, response.text
    routing: dict[str, Any] = response.json()["routing"]
    text = response.json()["choices"][0]["message"]["content"]
    assert text == f"{routing['reasoning_lambda']:g}"
    assert response.headers["X-Reasoning-Lambda"] == f"{routing['reasoning_lambda']:g}"
    return routing


# --- inputs ---


@pytest.mark.parametrize(
    ("fields", "value", "source"),
    [
        ({}, 0.8, "default"),
        ({"thinking_token_budget": 300}, 0.6, "budget"),
        ({"thinking_budget": 300}, 0.6, "budget"),
        ({"thinking": {"type": "enabled", "budget_tokens": 300}}, 0.6, "budget"),
        ({"reasoning": {"max_tokens": 300}}, 0.6, "budget"),
        ({"reasoning_effort": "none"}, 0.0, "effort"),
        ({"reasoning_effort": 0.8}, 0.6, "effort"),
        ({"reasoning_effort": "max"}, 0.8, "effort"),
        ({"reasoning": {"effort": "max"}}, 0.8, "effort"),
        ({"enable_thinking": False}, 0.0, "enable_thinking"),
        ({"enable_thinking": True}, 0.8, "enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 0.0, "enable_thinking"),
        ({"reasoning": {"enabled": False}}, 0.0, "enable_thinking"),
        ({"thinking": {"type": "disabled"}}, 0.0, "enable_thinking"),
        ({"thinking": {"type": "adaptive"}}, 0.8, "enable_thinking"),
        ({"model": "pair@0.3", "thinking_budget": 300}, 0.3, "model"),
        ({"reasoning_lambda": 0.3, "reasoning_effort": "max"}, 0.3, "body"),
    ],
)
def test_each_input_of_the_dial_chooses_a_lambda(
    profiled: MakeClient, fields: dict[str, Any], value: float, source: str
) -> None:
    routing = routed(profiled(), **fields)
    assert (routing["reasoning_lambda"], routing["source"]) == (value, source)
    assert (routing["profile"], routing["routing_class"]) == ("measured", "default")


def test_a_budget_is_a_hard_cap_too(profiled: MakeClient) -> None:
    client = profiled(opening=True)
    answer = chat(client, "say abcdefgh", thinking_budget=5, routing_class="math").json()
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "fgh",
        "reasoning_content": "abcde",
        "reasoning": "abcde",
    }
    assert answer["routing"] == {
        "reasoning_lambda": 0.5,
        "source": "budget",
        "profile": "measured",
        "routing_class": "math",
        "expected_reasoning_tokens": 5.0,
        "cap": 5,
        "forced_close": True,
    }


def test_reasoning_that_is_excluded_as_openrouter_does_is_left_out(profiled: MakeClient) -> None:
    client = profiled(opening=True)
    answer = chat(client, "say ab</think>c", reasoning={"effort": "max", "exclude": True}).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "c"}
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2


def test_a_stream_reports_routing_in_first_and_last_chunk(profiled: MakeClient) -> None:
    client = profiled()
    chunks = stream_events(client, "say xyz", reasoning_effort=0.8)
    with_routing = [index for index, chunk in enumerate(chunks) if "routing" in chunk]
    assert with_routing == [0, len(chunks) - 1]
    for index in with_routing:
        assert chunks[index]["routing"]["expected_reasoning_tokens"] == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking_budget": 1, "reasoning": {"max_tokens": 2}}, "reasoning.max_tokens"),
        ({"enable_thinking": False, "reasoning_effort": "low"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"strict": True}}, "chat_template_kwargs.strict"),
        ({"reasoning_effort": "most"}, "reasoning_effort"),
    ],
)
def test_a_contradiction_or_an_unknown_key_is_a_400_that_names_it(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    check_error(chat(client, "say x", **fields), 400, "invalid_request_error", param)


def test_a_pair_that_was_not_measured_gets_the_neutral_profile(client: TestClient) -> None:
    assert routed(client, reasoning_effort="medium") == {
        "reasoning_lambda": 0.5,
        "source": "effort",
        "profile": "neutral",
        "routing_class": "default",
    }
    shown = client.get("/v1/profiles").json()
    assert (shown["name"], shown["measured"]) == ("neutral", False)
    assert "This pair was not measured" in shown["source"]["description"]
    assert shown["classes"]["default"]["points"] == []


# --- the think threshold ---


def test_the_think_threshold_is_the_profiles_unless_the_operator_pins_it(
    profiled: MakeClient,
) -> None:
    """Below it the prompt opens no block, and the tag is plain text."""
    text = "say a</think>b"
    by_profile, pinned = profiled(opening=True), profiled(opening=True, think_threshold=0.1)

    def content(client: TestClient, value: float) -> str:
        answer = chat(client, text, reasoning_lambda=value).json()
        written: str = answer["choices"][0]["message"]["content"]
        return written

    assert [content(by_profile, value) for value in (0.3, 0.31)] == ["a</think>b", "b"]
    assert [content(pinned, value) for value in (0.1, 0.3)] == ["a</think>b", "b"]
    assert by_profile.get("/v1/profiles").json()["think_threshold"] == 0.3
    assert pinned.get("/v1/profiles").json()["think_threshold"] == 0.1


def test_a_profile_of_another_pair_is_used_with_a_warning(
    make_client: MakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = measured_profile(pair={"identity": "2" * 32, "instruct": "I", "thinking": "T"})
    other.save(tmp_path / "other.json")
    with caplog.at_level("WARNING", "server.service"):
        client = make_client(profile=str(tmp_path / "other.json"))
        assert routed(client)["profile"] == "measured"
    assert "measured on another pair" in caplog.text


# --- GET /v1/profiles ---


def test_the_profile_is_shown_with_its_front_and_the_routers_lengths(
    profiled: MakeClient,
) -> None:
    shown = profiled().get("/v1/profiles").json()
    assert (shown["object"], shown["name"], shown["measured"]) == ("profile", "measured", True)
    assert shown["pair"]["identity"] == "1" * 32
    points = shown["classes"]["default"]["points"]
    assert [it["lambda"] for it in points if it["on_front"]] == [0.0, 0.4, 0.6, 0.8]
    assert points[2]["router"] == {"mean": 100.0, "p90": 200.0, "p90_source": "measured"}
    efforts = shown["classes"]["default"]["efforts"]
    assert (efforts["none"], efforts["max"]) == (0.0, 0.8)
    assert list(efforts.values()) == sorted(efforts.values())
    assert shown["classes"].keys() == {"default", "math"}


def test_while_loading_profiles_are_a_503(make_client: MakeClient, tmp_path: Path) -> None:
    client = make_client("--load-gate", str(tmp_path / "gate"), wait=False)
    assert client.get("/v1/profiles").status_code == 503


# --- observed lengths ---


def test_lengths_of_finished_answers_are_observed_by_class_and_bucket(profiled: MakeClient) -> None:
    client = profiled(opening=True)
    for text in ("ab</think>x", "abcd</think>x"):
        chat(client, f"say {text}", reasoning_lambda=0.6, routing_class="math")
    observed = client.get("/v1/profiles").json()["classes"]["math"]["observed"]
    assert observed.keys() == {"0.6-0.7"}
    assert observed["0.6-0.7"] | {"p50": None, "p90": None} == {
        "samples": 2,
        "cut": 0,
        "mean": 3.0,
        "p50": None,
        "p90": None,
    }
    labels = {"routing_class": "math", "lambda_bucket": "0.6-0.7"}
    assert metric(client, "mi_observed_reasoning_tokens_count", **labels) == 2
    assert metric(client, "mi_observed_reasoning_tokens_sum", **labels) == 6
    median = metric(client, "mi_observed_reasoning_tokens", quantile="0.5", **labels)
    assert median is not None
    assert 2 <= median <= 4


@pytest.mark.parametrize(
    ("fields", "cut"),
    [
        ({"thinking_budget": 2}, 1),  # closed by force
        ({"max_tokens": 2}, 1),  # cut inside the block
        ({"max_tokens": 6}, 0),  # cut after it
        ({"stop": "x"}, 0),
    ],
)
def test_a_block_that_was_cut_is_observed_as_cut(
    profiled: MakeClient, fields: dict[str, Any], cut: int
) -> None:
    client = profiled(opening=True)
    chat(client, "say abcd</think>xyz", reasoning_lambda=0.6, **fields)
    observed = client.get("/v1/profiles").json()["classes"]["default"]["observed"]
    assert (observed["0.6-0.7"]["samples"], observed["0.6-0.7"]["cut"]) == (1, cut)


def test_failed_answers_and_lambdas_by_group_are_not_observed(profiled: MakeClient) -> None:
    client = profiled()
    chat(client, "fail", reasoning_lambda=0.6)
    chat(client, "say x", reasoning_lambda={"default": 0.6, "mlp": 1})
    assert client.get("/v1/profiles").json()["classes"]["default"]["observed"] == {}


def test_with_adapt_observed_lengths_decide(profiled: MakeClient) -> None:
    """λ = 0.8 was measured with a p90 of 600 tokens; here it takes two."""
    client = profiled(opening=True, adapt=True, adapt_min_samples=3)
    for _ in range(3):
        chat(client, "say ab</think>x", reasoning_lambda=0.8)
    assert chat(client, "say x", thinking_budget=300).json()["routing"]["reasoning_lambda"] == 0.6
    service = client.app_state["service"]
    service.router.rebuild()
    routing = chat(client, "say x", thinking_budget=300).json()["routing"]
    assert (routing["reasoning_lambda"], routing["expected_reasoning_tokens"]) == (0.8, 2)
    shown = client.get("/v1/profiles").json()
    assert shown["adapt"] is True
    (at_08,) = [it for it in shown["classes"]["default"]["points"] if it["lambda"] == 0.8]
    assert at_08["router"]["p90_source"] == "observed"


# --- load ---


def test_under_load_requests_without_a_lambda_run_at_a_cheaper_one_and_report_it(
    profiled: MakeClient, wait_until: WaitUntil
) -> None:
    client = profiled(elastic=True, elastic_waiting=1, elastic_effort=0.4)
    service = client.app_state["service"]
    assert routed(client)["reasoning_lambda"] == 0.8
    assert metric(client, "mi_elastic_active") == 0
    with client.stream("POST", "/v1/chat/completions", json=waiting_request()):
        wait_until(lambda: service.engine.stats.waiting == 1)
        moved = routed(client, reasoning_effort="max")
        assert (moved["reasoning_lambda"], moved["source"]) == (0.4, "effort")
        assert moved["elastic"] is True
        assert "elastic" not in routed(client, reasoning_lambda=0.8)
        assert metric(client, "mi_elastic_active") == 1
    labels = {"source": "elastic", "lambda_bucket": "0.4-0.5"}
    assert metric(client, "mi_router_decisions_total", **labels) == 1


def test_a_scrape_reports_load_and_changes_nothing(
    profiled: MakeClient, wait_until: WaitUntil
) -> None:
    client = profiled(elastic=True, elastic_waiting=1, elastic_dwell=3600)
    service = client.app_state["service"]
    with client.stream("POST", "/v1/chat/completions", json=waiting_request()):
        wait_until(lambda: service.engine.stats.waiting == 1)
        assert metric(client, "mi_elastic_active") == 1
        assert not service.elastic.active
    wait_until(lambda: service.engine.open_requests == 0)
    assert metric(client, "mi_elastic_active") == 0  # the scrape did not begin an hour of load


def waiting_request() -> dict[str, Any]:
    message = {"role": "user", "content": "wait"}
    return {"model": "pair", "messages": [message], "stream": True, "reasoning_lambda": 0.5}


def test_without_the_flag_load_changes_nothing(client: TestClient) -> None:
    service = client.app_state["service"]
    assert service.elastic is None
    assert not service.update_load()


# --- metrics ---


def test_routing_decisions_are_counted_by_their_source(profiled: MakeClient) -> None:
    client = profiled()
    routed(client)
    routed(client, thinking_budget=300)
    chat(client, "lambda", reasoning_lambda=[0.2, 0.6, 0.61])
    for source, bucket, count in [
        ("default", "0.8-0.9", 1),
        ("budget", "0.6-0.7", 1),
        ("body", "0.2-0.3", 1),
        ("body", "0.6-0.7", 2),
    ]:
        labels = {"source": source, "lambda_bucket": bucket}
        assert metric(client, "mi_router_decisions_total", **labels) == count


def test_the_share_of_a_budget_that_was_used_is_measured(profiled: MakeClient) -> None:
    client = profiled(opening=True)
    fields = {"reasoning_lambda": 0.6, "thinking_budget": 8}
    chat(client, "say ab</think>c", **fields)
    chat(client, "fail", **fields)
    chat(client, "say ab</think>c", reasoning_lambda=0.6)
    labels = {"lambda_bucket": "0.6-0.7"}
    assert metric(client, "mi_budget_used_ratio_count", **labels) == 1
    assert metric(client, "mi_budget_used_ratio_sum", **labels) == 0.25


def test_a_fan_out_reports_no_expected_tokens(profiled: MakeClient) -> None:
    answer = chat(profiled(), "lambda", reasoning_lambda=[0.2, 0.6], thinking_budget=100).json()
    assert answer["routing"] == {
        "reasoning_lambda": [0.2, 0.6],
        "source": "body",
        "profile": "measured",
        "routing_class": "default",
        "cap": 100,
    }
