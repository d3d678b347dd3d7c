"""Sampling parameters come from the request, else from the pair, and must fit the engine."""

from typing import Any

import pytest

from mi_runtime.request import SamplingParams
from server.engine.sampling import SamplingPolicy, seed_of_choice
from server.wire.errors import ContextTooLong, InvalidRequest
from tests.server.chat_bodies import parse
from tests.server.engine_info import ENGINE_INFO

GENERATION_CONFIG = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "max_length": 9}
POLICY = SamplingPolicy(GENERATION_CONFIG, frozenset({7}))


def resolve(prompt_tokens: int = 10, **fields: Any) -> SamplingParams:
    """Returns the sampling parameters of a chat request with these fields."""
    return POLICY.resolve(parse(**fields), prompt_tokens=prompt_tokens, info=ENGINE_INFO)


def test_a_field_that_is_absent_comes_from_the_pair() -> None:
    params = resolve()
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)
    assert params.eos_token_ids == {7}


def test_a_field_that_the_pair_leaves_open_changes_nothing() -> None:
    params = resolve()
    assert (params.min_p, params.repetition_penalty) == (0.0, 1.0)


def test_a_field_that_is_present_wins_even_if_it_is_zero() -> None:
    params = resolve(temperature=0, top_k=0)
    assert (params.temperature, params.top_k) == (0.0, 0)


def test_minus_one_turns_top_k_off() -> None:
    assert resolve(top_k=-1).top_k == 0


def test_the_answer_gets_the_room_that_the_prompt_leaves() -> None:
    assert resolve(prompt_tokens=60).max_tokens == 40
    assert resolve(prompt_tokens=60, max_tokens=50).max_tokens == 40
    assert resolve(prompt_tokens=60, max_tokens=30).max_tokens == 30


def test_a_prompt_without_room_for_one_token_is_too_long_with_both_numbers() -> None:
    assert resolve(prompt_tokens=99).max_tokens == 1
    with pytest.raises(ContextTooLong, match=r"100 tokens.*holds 100") as caught:
        resolve(prompt_tokens=100)
    assert caught.value.code == "context_length_exceeded"


def test_min_tokens_above_max_tokens_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(min_tokens=50, max_tokens=40)
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"320": 1}}, "logit_bias.320"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"²": 1}}, "logit_bias.²"),
        ({"stop_token_ids": [5, 320]}, "stop_token_ids[1]"),
    ],
)
def test_a_token_id_that_does_not_exist_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(**fields)
    assert caught.value.param == param


def test_biases_and_stop_tokens_reach_the_engine() -> None:
    params = resolve(logit_bias={"5": -100, "6": 1.5}, stop_token_ids=[1, 2], ignore_eos=True)
    assert params.logit_bias == ((5, -100.0), (6, 1.5))
    assert params.ending_token_ids == {1, 2}


def test_logprobs_are_off_alone_or_with_alternatives() -> None:
    assert resolve().logprobs is None
    assert resolve(logprobs=True).logprobs == 0
    assert resolve(logprobs=True, top_logprobs=3).logprobs == 3


def test_choices_have_seeds_of_their_own_that_never_leave_the_range() -> None:
    assert [seed_of_choice(5, index) for index in range(3)] == [5, 6, 7]
    assert seed_of_choice(None, 3) is None
    assert 0 <= (seed_of_choice(-(2**63), 0) or 0) < 2**63
