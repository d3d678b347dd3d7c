"""Every form of the dial works from an unmodified `openai` client to the embedded pair."""

import re
from typing import Any

import openai
import pytest

from tests.contract.conftest import ServerProcess

QUESTION = "a=6,b=a-2,c=b+6,d=c-3. d?"
LAMBDAS = [0.0, 0.3, 0.6, 1.0]


def ask(client: Any, value: Any, **fields: Any) -> Any:
    extra = {"reasoning_lambda": value} | fields.pop("extra", {})
    fields = {"temperature": 0, "model": "pair", "logprobs": True, "max_tokens": 60} | fields
    messages = [{"role": "user", "content": QUESTION}]
    return client.chat.completions.create(messages=messages, extra_body=extra, **fields)


def tokens(answer: Any, choice: int = 0) -> list[str]:
    """Returns every token, tags included, as the model wrote it."""
    return [entry.token for entry in answer.choices[choice].logprobs.content]


def logprobs(answer: Any) -> list[float]:
    return [entry.logprob for entry in answer.choices[0].logprobs.content]


def test_an_object_of_equal_lambdas_answers_as_the_plain_lambda(client: openai.OpenAI) -> None:
    for value in (0.0, 0.6, 1.0):
        same = {"default": value, "attn": value, "mlp": value, "layers": {"0-3": value}}
        plain, grouped = ask(client, value), ask(client, same)
        assert tokens(grouped) == tokens(plain)
        assert grouped.routing == plain.routing


def test_each_group_of_an_object_changes_the_logprobs(client: openai.OpenAI) -> None:
    plain = logprobs(ask(client, 0.6, max_tokens=1))
    for group in ("attn", "mlp", "embed", "head"):
        grouped = ask(client, {"default": 0.6, group: 1.0}, max_tokens=1)
        assert grouped.routing["reasoning_lambda"] == {"default": 0.6, group: 1.0}
        assert logprobs(grouped) != pytest.approx(plain, abs=1e-6), group
    one_layer = {"default": 0.6, "layers": {"2": {"mlp": 1.0}}}
    assert logprobs(ask(client, one_layer, max_tokens=1)) != pytest.approx(plain, abs=1e-6)


def test_a_fan_out_answers_as_each_lambda_alone(client: openai.OpenAI) -> None:
    together = ask(client, LAMBDAS, n=len(LAMBDAS))
    assert [choice.reasoning_lambda for choice in together.choices] == LAMBDAS
    assert together.routing["reasoning_lambda"] == LAMBDAS
    assert "expected_reasoning_tokens" not in together.routing
    for index, value in enumerate(LAMBDAS):
        alone = ask(client, value)
        assert tokens(together, index) == tokens(alone)
        assert together.choices[index].message == alone.choices[0].message


def test_a_sampled_fan_out_draws_as_each_lambda_alone(client: openai.OpenAI) -> None:
    drawn: dict[str, Any] = {"temperature": 1.3, "seed": 11}
    together = ask(client, LAMBDAS, **drawn)
    for index, value in enumerate(LAMBDAS):
        assert tokens(together, index) == tokens(ask(client, value, **drawn))


def test_a_streamed_fan_out_adds_up_to_the_plain_one(client: openai.OpenAI) -> None:
    plain = ask(client, LAMBDAS)
    chunks = [chunk for chunk in ask(client, LAMBDAS, stream=True) if chunk.choices]
    for index, choice in enumerate(plain.choices):
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(it.delta.content or "" for it in parts) == choice.message.content
        assert parts[0].reasoning_lambda == parts[-1].reasoning_lambda == LAMBDAS[index]
        assert parts[-1].finish_reason == choice.finish_reason


# --- the cap ---


@pytest.mark.parametrize("cap", [0, 1, 7, 20])
def test_reasoning_ends_exactly_at_the_cap_and_an_answer_follows(
    client: openai.OpenAI, cap: int
) -> None:
    free = ask(client, 1.0)
    answer = ask(client, 1.0, extra={"thinking_token_budget": cap})
    assert answer.usage.completion_tokens_details.reasoning_tokens == cap
    until_the_cap = slice(cap + 1)  # <think>, and the tokens of the cap
    assert tokens(answer)[until_the_cap] == tokens(free)[until_the_cap]
    assert tokens(answer)[cap + 1 : cap + 4] == ["\n", "</think>", "\n\n"]
    message = answer.choices[0].message
    assert message.content.startswith("Answer:")
    # The forced tokens are not shown; a closing tag that the model writes later is plain text.
    assert "think>" not in getattr(message, "reasoning_content", "")
    assert message.content.count("</think>") == tokens(answer).count("</think>") - 1
    reported = {"reasoning_lambda": 1.0, "source": "body", "cap": cap, "forced_close": True}
    assert reported.items() <= answer.routing.items()


def test_a_cap_that_is_not_reached_does_not_change_the_answer(client: openai.OpenAI) -> None:
    free, capped = ask(client, 1.0), ask(client, 1.0, extra={"thinking_token_budget": 500})
    assert tokens(capped) == tokens(free)
    assert capped.routing == free.routing | {"cap": 500}


def test_a_cap_applies_in_a_stream(client: openai.OpenAI) -> None:
    plain = ask(client, 1.0, extra={"thinking_budget": 9})
    chunks = list(ask(client, 1.0, stream=True, extra={"thinking_budget": 9}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    message = plain.choices[0].message
    assert "".join(it.content or "" for it in deltas) == message.content
    assert "".join(getattr(it, "reasoning_content", "") for it in deltas) == message.reasoning
    assert "forced_close" not in chunks[0].routing
    assert chunks[-1].routing["forced_close"] is True


def test_in_a_soft_window_a_block_closes_at_the_end_of_a_line(client: openai.OpenAI) -> None:
    """The window of a cap between 20 and 29 is two tokens."""
    free = tokens(ask(client, 1.0))
    inside = free[1 : free.index("</think>")]
    ends = [index + 1 for index, token in enumerate(inside) if token.endswith("\n")]
    end = next(it for it in ends if it >= 20)
    answer = ask(client, 1.0, extra={"thinking_budget": end + 2})
    assert answer.usage.completion_tokens_details.reasoning_tokens == end
    assert answer.routing["forced_close"] is True


# --- the answer's λ ---


def test_an_answer_lambda_equal_to_the_reasonings_does_not_change_the_answer(
    client: openai.OpenAI,
) -> None:
    plain = ask(client, 1.0)
    same = ask(client, 1.0, extra={"answer_lambda": 1.0})
    assert tokens(same) == tokens(plain)
    assert logprobs(same) == pytest.approx(logprobs(plain), abs=1e-4)
    assert same.routing == plain.routing | {"answer_lambda": 1.0}


def test_an_answer_lambda_changes_the_model_of_the_answer_alone(client: openai.OpenAI) -> None:
    plain = ask(client, 1.0)
    switched = ask(client, 1.0, extra={"answer_lambda": 0.0})
    close = tokens(plain).index("</think>") + 1
    assert tokens(switched)[:close] == tokens(plain)[:close]
    assert logprobs(switched)[:close] == pytest.approx(logprobs(plain)[:close], abs=1e-4)
    assert logprobs(switched)[close:] != pytest.approx(logprobs(plain)[close:], abs=1e-4)
    assert switched.choices[0].message.content.startswith("Answer:")


def test_without_a_think_block_an_answer_lambda_has_no_effect(
    client: openai.OpenAI,
) -> None:
    plain, with_answer_lambda = ask(client, 0.0), ask(client, 0.0, extra={"answer_lambda": 1.0})
    assert tokens(with_answer_lambda) == tokens(plain)


def test_a_forced_close_switches_to_the_answers_lambda(client: openai.OpenAI) -> None:
    budget = {"thinking_token_budget": 7}
    plain = ask(client, 1.0, extra=budget)
    switched = ask(client, 1.0, extra=budget | {"answer_lambda": 0.0})
    close = tokens(plain).index("</think>") + 1
    assert logprobs(switched)[:close] == pytest.approx(logprobs(plain)[:close], abs=1e-4)
    assert logprobs(switched)[close:] != pytest.approx(logprobs(plain)[close:], abs=1e-4)


# --- refusals and metrics ---


@pytest.mark.parametrize(
    ("value", "extra", "param"),
    [
        ({"attn": 0.5}, {}, "reasoning_lambda.default"),
        ({"default": 0.5, "layers": {"0-99": 1}}, {}, "reasoning_lambda.layers.0-99"),
        ([0.5, 7], {}, "reasoning_lambda[1]"),
        ([0.5, 0.7], {"n": 3}, "n"),
        (0.5, {"answer_lambda": 1.01}, "answer_lambda"),
        (0.5, {"thinking_budget": 1, "thinking_token_budget": 2}, "thinking_budget"),
    ],
)
def test_a_bad_dial_is_openais_bad_request_error(
    client: openai.OpenAI, value: Any, extra: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, value, extra=extra)
    assert caught.value.param == param


def counters(server: Any) -> dict[str, float]:
    """Returns the engine's counters by name and way."""
    text = server.get("/metrics").text
    pattern = r"^mi_(layer_executions|blend_cache_\w+|forced_close)_total\{(.*)\} (\S+)$"
    found = re.findall(pattern, text, re.MULTILINE)
    way = re.compile(r'way="(\w+)"')
    return {
        f"{name} {way.search(labels)[1]}" if "way=" in labels else name: float(value)  # type: ignore[index]
        for name, labels, value in found
    }


def increased(server: Any, before: dict[str, float]) -> set[str]:
    """Returns the counters that are larger than before."""
    return {name for name, value in counters(server).items() if value > before[name]}


def test_the_metrics_count_what_the_engine_does(
    client: openai.OpenAI, real_server: ServerProcess
) -> None:
    before = counters(real_server)
    assert {"blend_cache_hits", "blend_cache_builds", "blend_cache_evictions"} <= before.keys()
    ask(client, 0.0)
    assert increased(real_server, before) == {"layer_executions endpoint"}
    before = counters(real_server)
    ask(client, [0.13, 0.77], max_tokens=5)
    ways = {"layer_executions pair", "layer_executions blended"}  # the planner's choice
    assert ways & increased(real_server, before)
    before = counters(real_server)
    ask(client, 1.0, extra={"thinking_budget": 1})
    assert increased(real_server, before) == {"layer_executions endpoint", "forced_close"}
