"""Which λ a request runs at: from its body, its model alias or its header, else the default.

Ways that name different values are a conflict, never a silent choice.
"""

import math
from dataclasses import dataclass
from typing import Any

from mi_runtime.request import Dial
from server.errors import InvalidRequest, ModelNotFound, bounded

HEADER = "X-Reasoning-Lambda"


@dataclass(frozen=True, slots=True)
class Routing:
    """The λ of one request and what it came from, as the answer tells it."""

    dial: Dial
    source: str  # body, model, header or default

    @property
    def header(self) -> str:
        return f"{self.dial.reasoning_lambda:g}"

    @property
    def body(self) -> dict[str, Any]:
        return {"reasoning_lambda": self.dial.reasoning_lambda, "source": self.source}


@dataclass(frozen=True, slots=True)
class DialPolicy:
    """The server's grid and default, and the name whose aliases it reads."""

    model_name: str
    step: float
    default: float

    def route(self, *, model: str, body: float | None, header: str | None) -> Routing:
        """Raises `ModelNotFound` and, for a bad or contradictory λ, `InvalidRequest`."""
        alias = self.alias_lambda(model)
        said: dict[str, Dial] = {}
        if body is not None:
            said["body"] = self._on_grid(body, "reasoning_lambda")
        if alias is not None:
            said["model"] = self._on_grid(alias, "model")
        if header is not None:
            said["header"] = self._on_grid(parse_lambda(header, HEADER), HEADER)
        if len(set(said.values())) > 1:
            listed = ", ".join(f"{dial.reasoning_lambda:g} ({way})" for way, dial in said.items())
            raise InvalidRequest(
                f"The request names different λ values: {listed}", param="reasoning_lambda"
            )
        for source, dial in said.items():
            return Routing(dial, source)
        return Routing(self._on_grid(self.default, "default_lambda"), "default")

    def alias_lambda(self, model: str) -> float | None:
        """The λ in `NAME@0.6`; None for the plain name."""
        if model == self.model_name:
            return None
        name, _, value = model.rpartition("@")
        if name != self.model_name:
            raise ModelNotFound(model, self.model_name)
        return parse_lambda(value, "model")

    def _on_grid(self, value: float, param: str) -> Dial:
        try:
            return Dial.on_grid(value, self.step)
        except ValueError as error:
            raise InvalidRequest(str(error), param=param) from None


def parse_lambda(text: str, param: str) -> float:
    """A finite number written as text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest(f"λ must be a number, not {bounded(text, 40)!r}", param=param)
    return value
