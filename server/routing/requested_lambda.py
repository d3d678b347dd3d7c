"""Reads the λ that a request names in its body, its model alias or its header.

A request that names different values in different places is refused. If it names none, it gets
the server's default, and `server.routing.routing_policy` may choose another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from mi_runtime.request import Dial
from server.routing.group_lambdas import PARAM, check_lambda, dial_of_groups, dial_to_json
from server.wire.errors import InvalidRequest, ModelNotFound, bounded
from server.wire.generation_request import RequestedLambda
from server.wire.reasoning_fields import GroupLambdas

LAMBDA_HEADER: Final = "X-Reasoning-Lambda"
DEFAULT: Final = "default"
"""Source of the λ of a request that names none."""


@dataclass(frozen=True, slots=True)
class RequestedDials:
    """The dials that a request names, or else the default one."""

    dials: tuple[Dial, ...]  # in a fan-out one for each choice, else one for all
    source: str  # body, model, header or default
    fan_out: bool = False
    answer_dial: Dial | None = None  # from the end of the think block on
    layers: int = 0  # of the model


@dataclass(frozen=True, slots=True)
class LambdaReader:
    """Reads requested λ on the server's grid. It knows the default λ and the served name."""

    model_name: str  # before `@` in an alias
    step: float  # of the λ grid
    default: float  # λ

    def read(
        self, *, model: str, body: RequestedLambda | None, header: str | None, layers: int = 0
    ) -> RequestedDials:
        """Returns the dials that the request names, or else the default one.

        `layers` is the model's number of layers; λ by blend group needs it. Raises
        `ModelNotFound`, and `InvalidRequest` for a bad or contradictory λ.
        """
        alias = self.alias_lambda(model)
        named: dict[str, tuple[Dial, ...]] = {}
        if body is not None:
            named["body"] = self._body_dials(body, layers)
        if alias is not None:
            named["model"] = (self.on_grid(alias, "model"),)
        if header is not None:
            named["header"] = (self.on_grid(parse_lambda(header, LAMBDA_HEADER), LAMBDA_HEADER),)
        _check_agreement(named, layers)
        default = (self.on_grid(self.default, "default_lambda"),)
        source, dials = next(iter(named.items()), (DEFAULT, default))
        return RequestedDials(dials, source, fan_out=isinstance(body, list), layers=layers)

    def with_answer(self, requested: RequestedDials, value: float | None) -> RequestedDials:
        """Returns the dials with `value` as the answer's λ, if one is given."""
        if value is None:
            return requested
        return replace(requested, answer_dial=self.on_grid(value, "answer_lambda"))

    def alias_lambda(self, model: str) -> float | None:
        """Returns the λ in `NAME@0.6`, or None for the plain name. Raises `ModelNotFound`."""
        if model == self.model_name:
            return None
        name, _, value = model.rpartition("@")
        if name != self.model_name:
            raise ModelNotFound(model, self.model_name)
        return parse_lambda(value, "model")

    def on_grid(self, value: float, param: str) -> Dial:
        """Returns the dial nearest to `value`. Raises `InvalidRequest` about `param`."""
        check_lambda(value, param)
        return Dial.on_grid(value, self.step)

    def _body_dials(self, body: RequestedLambda, layers: int) -> tuple[Dial, ...]:
        if isinstance(body, GroupLambdas):
            return (dial_of_groups(body, step=self.step, layers=layers),)
        if isinstance(body, list):
            return tuple(self.on_grid(one, f"{PARAM}[{index}]") for index, one in enumerate(body))
        return (self.on_grid(body, PARAM),)


def parse_lambda(text: str, param: str) -> float:
    """Returns the finite number that `text` spells. Raises `InvalidRequest` about `param`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest(f"λ must be a number, not {bounded(text, 40)!r}", param=param)
    return value


def _check_agreement(named: dict[str, tuple[Dial, ...]], layers: int) -> None:
    if len(set(named.values())) > 1:
        listed = ", ".join(f"{_short(dials, layers)} ({place})" for place, dials in named.items())
        raise InvalidRequest(
            f"The request names different λ values: {listed}; name one value in the body, the "
            "model alias or the header, or the same value in each",
            param=PARAM,
        )


def _short(dials: Sequence[Dial], layers: int) -> str:
    return bounded(", ".join(str(dial_to_json(dial, layers)) for dial in dials), 100)
