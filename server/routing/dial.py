"""The λ a request names: in its body, its model alias or its header, else the default.

Ways that name different values are a conflict, never a silent choice. Where no λ is named,
`server.routing.policy` may choose another than the default.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from mi_runtime.request import Dial
from server.routing.group_lambdas import PARAM, check_lambda, group_dial, told
from server.wire.errors import InvalidRequest, ModelNotFound, bounded
from server.wire.reasoning_fields import GroupLambdas

HEADER = "X-Reasoning-Lambda"
DEFAULT: Final = "default"
"""Source of a λ that the request said nothing about."""

WireLambda = float | GroupLambdas | list[float]
"""One λ; λ by blend group; or a fan-out, one choice for each λ."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The dials of one request and what they came from, as the answer tells it."""

    dials: tuple[Dial, ...]  # in a fan-out one for each choice, else one for all
    source: str  # body, model, header or default; see `server.routing.policy` for the others
    fan_out: bool = False
    answer: Dial | None = None  # from the think block's end on
    cap: int | None = None  # reasoning tokens
    layers: int = 0  # of the model
    profile: str | None = None
    routing_class: str | None = None
    expected: float | None = None  # reasoning tokens
    elastic: bool = False  # cheaper than asked, because of load

    @property
    def header(self) -> str:
        """The answer's `X-Reasoning-Lambda`: of λ by blend group, the default."""
        return ",".join(f"{dial.reasoning_lambda:g}" for dial in self.dials)

    @property
    def body(self) -> dict[str, Any]:
        values = [told(dial, self.layers) for dial in self.dials]
        body: dict[str, Any] = {"reasoning_lambda": values if self.fan_out else values[0]}
        if self.answer is not None:
            body["answer_lambda"] = self.answer.reasoning_lambda
        body["source"] = self.source
        return body | self._details

    @property
    def _details(self) -> dict[str, Any]:
        """What does not apply is left out."""
        said = {
            "profile": self.profile,
            "routing_class": self.routing_class,
            "expected_reasoning_tokens": None if self.expected is None else round(self.expected, 1),
            "cap": self.cap,
            "elastic": self.elastic or None,
        }
        return {name: value for name, value in said.items() if value is not None}

    def of_choice(self, choice: int) -> dict[str, Any]:
        """What a choice says of itself: in a fan-out its λ."""
        if not self.fan_out:
            return {}
        dial = self.dials[choice % len(self.dials)]  # choices go prompt by prompt
        return {"reasoning_lambda": dial.reasoning_lambda}


@dataclass(frozen=True, slots=True)
class DialPolicy:
    """The server's grid and default, and the name whose aliases it reads."""

    model_name: str
    step: float
    default: float

    def route(
        self, *, model: str, body: WireLambda | None, header: str | None, layers: int = 0
    ) -> Routing:
        """Raises `ModelNotFound` and, for a bad or contradictory λ, `InvalidRequest`."""
        alias = self.alias_lambda(model)
        said: dict[str, tuple[Dial, ...]] = {}
        if body is not None:
            said["body"] = self._body_dials(body, layers)
        if alias is not None:
            said["model"] = (self.on_grid(alias, "model"),)
        if header is not None:
            said["header"] = (self.on_grid(parse_lambda(header, HEADER), HEADER),)
        _check_agreement(said, layers)
        for source, dials in said.items():
            return Routing(dials, source, fan_out=isinstance(body, list), layers=layers)
        return Routing((self.on_grid(self.default, "default_lambda"),), DEFAULT, layers=layers)

    def with_answer(self, routing: Routing, value: float | None) -> Routing:
        """The same with an `answer_lambda`."""
        if value is None:
            return routing
        return replace(routing, answer=self.on_grid(value, "answer_lambda"))

    def alias_lambda(self, model: str) -> float | None:
        """The λ in `NAME@0.6`; None for the plain name."""
        if model == self.model_name:
            return None
        name, _, value = model.rpartition("@")
        if name != self.model_name:
            raise ModelNotFound(model, self.model_name)
        return parse_lambda(value, "model")

    def on_grid(self, value: float, param: str) -> Dial:
        check_lambda(value, param)
        return Dial.on_grid(value, self.step)

    def _body_dials(self, body: WireLambda, layers: int) -> tuple[Dial, ...]:
        if isinstance(body, GroupLambdas):
            return (group_dial(body, step=self.step, layers=layers),)
        if isinstance(body, list):
            return tuple(self.on_grid(one, f"{PARAM}[{index}]") for index, one in enumerate(body))
        return (self.on_grid(body, PARAM),)


def parse_lambda(text: str, param: str) -> float:
    """A finite number written as text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest(f"λ must be a number, not {bounded(text, 40)!r}", param=param)
    return value


def _check_agreement(said: dict[str, tuple[Dial, ...]], layers: int) -> None:
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{_short(dials, layers)} ({way})" for way, dials in said.items())
        raise InvalidRequest(
            f"The request names different λ values: {listed}; body, model alias and header must "
            "name the same one, or only one of them any",
            param=PARAM,
        )


def _short(dials: Sequence[Dial], layers: int) -> str:
    return bounded(", ".join(str(told(dial, layers)) for dial in dials), 100)
