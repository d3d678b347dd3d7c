"""Reads what a request says about reasoning besides λ: budget, effort, and thinking on or off.

Clients have several names for one option; all are read, and contradictions are refused. If a
request gives several options, the first in this order counts: off, budget, effort, on.
`server.routing.routing_policy` turns them into λ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from server.routing.profiles import DEFAULT_CLASS
from server.wire.errors import InvalidRequest
from server.wire.generation_request import GenerationRequest
from server.wire.reasoning_fields import EffortName

NO_BUDGET: Final = -1
NONE: Final = "none"
"""The effort that turns reasoning off."""

EFFORT_SHARES: Final[Mapping[EffortName, float]] = {
    "minimal": 0.1,
    "low": 0.25,
    "medium": 0.5,
    "high": 0.75,
    "xhigh": 0.9,
    "max": 1.0,
}
"""Share of the score that the profile's front gains from reasoning; `none` is λ = 0 instead."""


@dataclass(frozen=True, slots=True)
class ReasoningOptions:
    """What a request says about reasoning, each option once. None means that it says nothing."""

    budget: int | None = None  # reasoning tokens
    effort: float | EffortName | None = None
    thinks: bool | None = None  # thinking on or off, without an amount
    routing_class: str = DEFAULT_CLASS

    @property
    def off(self) -> bool:
        """Whether the request turns reasoning off."""
        return self.effort == NONE or self.thinks is False

    @property
    def share(self) -> float | None:
        """The effort as a share of the gain, 0 to 1; None without an effort."""
        return None if self.effort is None or self.effort == NONE else share_of(self.effort)


def read_reasoning_options(request: GenerationRequest) -> ReasoningOptions:
    """Returns the options of a request.

    Raises `InvalidRequest` that states the rule and names one of the fields in conflict.
    """
    limits, efforts, switches = budgets(request), _efforts(request), _switches(request)
    _check_agreement("sets different budgets", limits, limits.values())
    _check_agreement("sets different efforts", efforts, map(share_of, efforts.values()))
    _check_agreement("turns thinking both on and off", switches, switches.values())
    _check_objects(request)
    _check_off(limits, efforts, switches)
    budget = _first(limits)
    return ReasoningOptions(
        budget=None if budget == NO_BUDGET else budget,
        effort=_first(efforts),
        thinks=_first(switches),
        routing_class=request.routing_class,
    )


def share_of(effort: float | EffortName) -> float:
    """Returns the share of the gain that an effort means; -1, below all, for `none`."""
    return EFFORT_SHARES.get(effort, -1.0) if isinstance(effort, str) else effort


def budgets(request: GenerationRequest) -> dict[str, int]:
    """Returns every budget that is given, by the name of its field; -1 means no budget."""
    thinking, reasoning = request.thinking, request.reasoning
    return _given(
        {
            "thinking_token_budget": request.thinking_token_budget,
            "thinking_budget": request.thinking_budget,
            "thinking.budget_tokens": thinking and thinking.budget_tokens,
            "reasoning.max_tokens": reasoning and reasoning.max_tokens,
        }
    )


def _efforts(request: GenerationRequest) -> dict[str, float | EffortName]:
    reasoning = request.reasoning
    return _given(
        {
            "reasoning_effort": request.reasoning_effort,
            "reasoning.effort": reasoning and reasoning.effort,
        }
    )


def _switches(request: GenerationRequest) -> dict[str, bool]:
    options, thinking = request.chat_template_kwargs, request.thinking
    reasoning = request.reasoning
    return _given(
        {
            "enable_thinking": request.enable_thinking,
            "chat_template_kwargs.enable_thinking": options and options.enable_thinking,
            "thinking.type": thinking and thinking.type != "disabled",
            "reasoning.enabled": reasoning and reasoning.enabled,
        }
    )


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _first(fields: Mapping[str, Any]) -> Any:
    return next(iter(fields.values()), None)


def _check_agreement(conflict: str, fields: Mapping[str, Any], meanings: Iterable[float]) -> None:
    if len(set(meanings)) > 1:
        raise InvalidRequest(
            f"The request {conflict}: {_listed(fields)}; set only one of them, or the "
            "same value in each",
            param=list(fields)[-1],
        )


def _check_objects(request: GenerationRequest) -> None:
    """Raises `InvalidRequest` for fields of `reasoning` or `thinking` that exclude each other."""
    reasoning, thinking = request.reasoning, request.thinking
    if reasoning and reasoning.effort is not None and reasoning.max_tokens is not None:
        raise InvalidRequest(
            "`reasoning` may have `effort` or `max_tokens`, not both", param="reasoning.max_tokens"
        )
    if thinking and thinking.type != "enabled" and thinking.budget_tokens is not None:
        raise InvalidRequest(
            "`thinking.budget_tokens` is allowed only with `thinking.type: enabled`",
            param="thinking.budget_tokens",
        )


def _check_off(
    limits: Mapping[str, int],
    efforts: Mapping[str, float | EffortName],
    switches: Mapping[str, bool],
) -> None:
    """Raises `InvalidRequest` if the request turns reasoning off and also asks for it."""
    off: dict[str, Any] = {name: value for name, value in switches.items() if value is False}
    off |= {name: value for name, value in efforts.items() if value == NONE}
    wanted: dict[str, Any] = {name: value for name, value in limits.items() if value > 0}
    wanted |= {name: value for name, value in efforts.items() if value != NONE}
    wanted |= {name: value for name, value in switches.items() if value is True}
    if off and wanted:
        raise InvalidRequest(
            f"The request turns reasoning off ({_listed(off)}) and asks for it "
            f"({_listed(wanted)}); set only one of them",
            param=next(iter(wanted)),
        )


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{_written(value)} (`{name}`)" for name, value in fields.items())


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
