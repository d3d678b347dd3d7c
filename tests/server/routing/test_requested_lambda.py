"""A request names its λ in the body, the model name or a header, and λ is rounded to the grid."""

import pytest

from mi_runtime.request import Dial
from server.routing.reasoning_options import ReasoningOptions
from server.routing.requested_lambda import LambdaReader, RequestedDials
from server.routing.routing_decision import RoutingDecision
from server.routing.routing_policy import RoutingPolicy, RoutingSettings
from server.wire.errors import ApiError, InvalidRequest, ModelNotFound
from server.wire.generation_request import RequestedLambda
from server.wire.reasoning_fields import GroupLambdas

READER = LambdaReader("pair", step=0.01, default=0.8)


def read(
    model: str = "pair", body: RequestedLambda | None = None, header: str | None = None
) -> RequestedDials:
    return READER.read(model=model, body=body, header=header, layers=4)


def decision(requested: RequestedDials) -> RoutingDecision:
    settings = RoutingSettings(default=0.8, step=0.01, think_threshold=0.0)
    return RoutingPolicy(None, settings).decide(requested, ReasoningOptions())


def test_the_default_applies_where_no_lambda_is_named() -> None:
    assert read() == RequestedDials((Dial(0.8),), "default", layers=4)


@pytest.mark.parametrize(
    ("named", "source"),
    [({"body": 0.6}, "body"), ({"model": "pair@0.6"}, "model"), ({"header": "0.6"}, "header")],
)
def test_body_model_name_and_header_each_set_lambda(named: dict[str, object], source: str) -> None:
    assert read(**named) == RequestedDials((Dial(0.6),), source, layers=4)  # type: ignore[arg-type]


def test_a_lambda_is_rounded_to_the_grid() -> None:
    assert read(body=0.6049).dials == (Dial(0.6),)
    assert read(body=0.30000000000000004).dials == (Dial(0.3),)


def test_equal_values_in_several_places_are_accepted() -> None:
    assert read("pair@0.6", 0.6, "0.600").source == "body"


@pytest.mark.parametrize(
    "named",
    [
        {"model": "pair@0.5", "body": 0.6},
        {"body": 0.6, "header": "0.7"},
        {"model": "pair@0.5", "header": "0.7"},
    ],
)
def test_different_values_in_two_places_are_refused(named: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="different λ values"):
        read(**named)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_lambda_out_of_range_names_its_field(value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body=value)
    assert caught.value.param == "reasoning_lambda"


@pytest.mark.parametrize("text", ["", "nan", "inf", "high", "0.6x", "1.5", "-1", "9" * 1000])
def test_a_bad_header_names_itself_and_is_not_echoed_at_length(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(header=text)
    assert caught.value.param == "X-Reasoning-Lambda"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("name", ["other", "other@0.5", "@0.5", "pair@0.5@0.5", ""])
def test_a_model_name_that_is_not_served_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFound):
        read(name)


def test_an_alias_with_a_bad_lambda_is_refused_as_the_field_model() -> None:
    with pytest.raises(ApiError) as caught:
        read("pair@2")
    assert (caught.value.status, caught.value.param) == (400, "model")


def test_a_served_name_may_hold_an_at_sign() -> None:
    reader = LambdaReader("pair@home", step=0.01, default=0.8)
    assert reader.read(model="pair@home", body=None, header=None).source == "default"
    assert reader.read(model="pair@home@0.2", body=None, header=None).dials == (Dial(0.2),)


# --- the other forms ---


def groups(**named: object) -> GroupLambdas:
    return GroupLambdas.model_validate(named)


def test_a_list_is_a_fan_out_with_a_dial_for_each_choice() -> None:
    requested = read(body=[0.2, 0.604, 1])
    assert requested.dials == (Dial(0.2), Dial(0.6), Dial(1.0))
    routing = decision(requested)
    assert routing.header == "0.2,0.6,1"
    assert routing.body["reasoning_lambda"] == [0.2, 0.6, 1.0]
    assert routing.body["source"] == "body"
    assert routing.of_choice(1) == {"reasoning_lambda": 0.6}
    assert decision(read(body=0.6)).of_choice(0) == {}


def test_a_list_of_one_is_still_a_fan_out() -> None:
    assert decision(read(body=[0.6])).body["reasoning_lambda"] == [0.6]


def test_a_bad_lambda_in_a_list_names_its_place() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body=[0.2, 1.2])
    assert caught.value.param == "reasoning_lambda[1]"


def test_the_answers_header_has_the_default_of_an_object() -> None:
    routing = decision(read(body=groups(default=0.6, attn=0.8)))
    assert routing.header == "0.6"
    assert routing.body["reasoning_lambda"] == {"default": 0.6, "attn": 0.8}


@pytest.mark.parametrize(
    ("body", "alias"),
    [
        (GroupLambdas(default=0.6, attn=0.8), 0.6),
        (GroupLambdas(default=0.6, attn=0.6), 0.7),
        ([0.6, 0.6], 0.6),
    ],
)
def test_objects_and_lists_conflict_with_an_alias_that_means_another_dial(
    body: RequestedLambda, alias: float
) -> None:
    with pytest.raises(InvalidRequest, match="name one value") as caught:
        read(f"pair@{alias}", body)
    assert caught.value.param == "reasoning_lambda"
    assert len(caught.value.message) < 400


def test_an_object_with_the_dial_of_the_alias_agrees_with_it() -> None:
    assert read("pair@0.6", groups(default=0.6)).source == "body"


def test_an_answer_lambda_is_rounded_to_the_grid() -> None:
    requested = READER.with_answer(read(body=0.6), 0.2049)
    assert requested.answer_dial == Dial(0.2)
    assert decision(requested).body["answer_lambda"] == 0.2
    with pytest.raises(InvalidRequest) as caught:
        READER.with_answer(read(), 1.5)
    assert caught.value.param == "answer_lambda"
