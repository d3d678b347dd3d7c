import pytest

from mi_runtime.request import Dial
from server.dial import DialPolicy, Routing, WireLambda
from server.errors import ApiError, InvalidRequest, ModelNotFound

POLICY = DialPolicy("pair", step=0.01, default=0.8)


def route(
    model: str = "pair", body: WireLambda | None = None, header: str | None = None
) -> Routing:
    return POLICY.route(model=model, body=body, header=header, layers=4)


def test_the_default_applies_where_nothing_is_said() -> None:
    assert route() == Routing((Dial(0.8),), "default", layers=4)


@pytest.mark.parametrize(
    ("said", "source"),
    [({"body": 0.6}, "body"), ({"model": "pair@0.6"}, "model"), ({"header": "0.6"}, "header")],
)
def test_each_way_names_a_lambda(said: dict[str, object], source: str) -> None:
    assert route(**said) == Routing((Dial(0.6),), source, layers=4)  # type: ignore[arg-type]


def test_a_lambda_is_rounded_to_the_grid() -> None:
    assert route(body=0.6049).dials == (Dial(0.6),)
    assert route(body=0.30000000000000004).dials == (Dial(0.3),)


def test_ways_that_agree_are_no_conflict() -> None:
    assert route("pair@0.6", 0.6, "0.600").source == "body"


@pytest.mark.parametrize(
    "said",
    [
        {"model": "pair@0.5", "body": 0.6},
        {"body": 0.6, "header": "0.7"},
        {"model": "pair@0.5", "header": "0.7"},
    ],
)
def test_two_different_values_are_refused(said: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="different λ values"):
        route(**said)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_lambda_out_of_range_names_its_field(value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        route(body=value)
    assert caught.value.param == "reasoning_lambda"


@pytest.mark.parametrize("text", ["", "nan", "inf", "high", "0.6x", "1.5", "-1", "9" * 1000])
def test_a_bad_header_names_itself_and_is_not_echoed_at_length(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        route(header=text)
    assert caught.value.param == "X-Reasoning-Lambda"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("name", ["other", "other@0.5", "@0.5", "pair@0.5@0.5", ""])
def test_a_name_that_is_not_served_does_not_exist(name: str) -> None:
    with pytest.raises(ModelNotFound):
        route(name)


def test_an_alias_with_a_bad_lambda_is_about_the_model() -> None:
    with pytest.raises(ApiError) as caught:
        route("pair@2")
    assert (caught.value.status, caught.value.param) == (400, "model")


def test_a_served_name_may_hold_an_at_sign() -> None:
    policy = DialPolicy("pair@home", step=0.01, default=0.8)
    assert policy.route(model="pair@home", body=None, header=None).source == "default"
    assert policy.route(model="pair@home@0.2", body=None, header=None).dials == (Dial(0.2),)
