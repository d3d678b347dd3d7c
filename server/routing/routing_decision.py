"""The result of routing: the λ that a request runs at, and why."""

from dataclasses import dataclass
from typing import Any

from mi_runtime.request import Dial
from server.routing.group_lambdas import dial_to_json


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """The dials of one request and where they came from; the answer's `routing` reports it."""

    dials: tuple[Dial, ...]  # in a fan-out one for each choice, else one for all
    source: str  # body, model, header, budget, effort, enable_thinking or default
    fan_out: bool = False
    answer_dial: Dial | None = None  # from the end of the think block on
    cap: int | None = None  # reasoning tokens
    layers: int = 0  # of the model
    profile: str | None = None  # name
    routing_class: str | None = None
    expected: float | None = None  # mean reasoning tokens
    elastic: bool = False  # load made it cheaper than requested

    @property
    def header(self) -> str:
        """The value of `X-Reasoning-Lambda`. For λ by blend group it is the default λ."""
        return ",".join(f"{dial.reasoning_lambda:g}" for dial in self.dials)

    @property
    def body(self) -> dict[str, Any]:
        """The `routing` object of an answer, without the fields that do not apply."""
        values = [dial_to_json(dial, self.layers) for dial in self.dials]
        body: dict[str, Any] = {"reasoning_lambda": values if self.fan_out else values[0]}
        if self.answer_dial is not None:
            body["answer_lambda"] = self.answer_dial.reasoning_lambda
        body["source"] = self.source
        return body | self._details

    @property
    def _details(self) -> dict[str, Any]:
        details = {
            "profile": self.profile,
            "routing_class": self.routing_class,
            "expected_reasoning_tokens": None if self.expected is None else round(self.expected, 1),
            "cap": self.cap,
            "elastic": self.elastic or None,
        }
        return {name: value for name, value in details.items() if value is not None}

    def of_choice(self, choice: int) -> dict[str, Any]:
        """Returns the fields that a choice has for itself: its λ in a fan-out, or else none."""
        if not self.fan_out:
            return {}
        dial = self.dials[choice % len(self.dials)]  # choices go prompt by prompt
        return {"reasoning_lambda": dial.reasoning_lambda}
