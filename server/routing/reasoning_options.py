"""What a request says about reasoning besides λ: budget, effort, and thinking on or off.

Several clients' names for one thing come together here, and what contradicts itself is refused. Of
different things the first that is said counts: off, else budget > effort > on. What λ they mean is
decided in `server.routing.policy`.
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

EFFORT_SHARES: Final[Mapping[EffortName, float]] = {
    "minimal": 0.1,
    "low": 0.25,
    "medium": 0.5,
    "high": 0.75,
    "xhigh": 0.9,
    "max": 1.0,
}
"""Share of what reasoning gains on the profile's front; `none` is no share but λ = 0."""


@dataclass(frozen=True, slots=True)
class ReasoningInputs:
    """What a request says, each thing once."""

    budget: int | None = None  # reasoning tokens
    effort: float | EffortName | None = None
    thinks: bool | None = None  # asked for or refused, without saying how much
    routing_class: str = DEFAULT_CLASS

    @property
    def off(self) -> bool:
        return self.effort == NONE or self.thinks is False

    @property
    def share(self) -> float | None:
        """The effort as a share of the gain."""
        return None if self.effort is None or self.effort == NONE else share_of(self.effort)


def read_inputs(request: GenerationRequest) -> ReasoningInputs:
    """Raises `InvalidRequest` that states the rule and names one of the fields in conflict."""
    said, efforts, switches = budgets(request), _efforts(request), _switches(request)
    _agree("budgets of reasoning tokens", said, said.values())
    _agree("reasoning efforts", efforts, map(share_of, efforts.values()))
    _agree("answers to whether to think", switches, switches.values())
    _check_parts(request)
    _check_off(said, efforts, switches)
    budget = _first(said)
    return ReasoningInputs(
        budget=None if budget == NO_BUDGET else budget,
        effort=_first(efforts),
        thinks=_first(switches),
        routing_class=request.routing_class,
    )


def share_of(effort: float | EffortName) -> float:
    """`none` has no share: it is below all."""
    return EFFORT_SHARES.get(effort, -1.0) if isinstance(effort, str) else effort


def budgets(request: GenerationRequest) -> dict[str, int]:
    """Every budget of reasoning tokens that is written, by its field; -1: no budget."""
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


def _first(said: Mapping[str, Any]) -> Any:
    return next(iter(said.values()), None)


# --- Rules ---------------------------------------------------------------------------------------


def _agree(what: str, said: Mapping[str, Any], meant: Iterable[float]) -> None:
    if len(set(meant)) > 1:
        raise InvalidRequest(
            f"The request names different {what}: {_listed(said)}; give one of them, or the same",
            param=list(said)[-1],
        )


def _check_parts(request: GenerationRequest) -> None:
    """The rules inside `reasoning` and `thinking`."""
    reasoning, thinking = request.reasoning, request.thinking
    if reasoning and reasoning.effort is not None and reasoning.max_tokens is not None:
        raise InvalidRequest(
            "`reasoning` takes `effort` or `max_tokens`, not both", param="reasoning.max_tokens"
        )
    if thinking and thinking.type != "enabled" and thinking.budget_tokens is not None:
        raise InvalidRequest(
            "`thinking.budget_tokens` needs `thinking.type` `enabled`",
            param="thinking.budget_tokens",
        )


def _check_off(
    said: Mapping[str, int],
    efforts: Mapping[str, float | EffortName],
    switches: Mapping[str, bool],
) -> None:
    """No reasoning, and yet some of it."""
    off: dict[str, Any] = {name: value for name, value in switches.items() if value is False}
    off |= {name: value for name, value in efforts.items() if value == NONE}
    wanted: dict[str, Any] = {name: value for name, value in said.items() if value > 0}
    wanted |= {name: value for name, value in efforts.items() if value != NONE}
    wanted |= {name: value for name, value in switches.items() if value is True}
    if off and wanted:
        raise InvalidRequest(
            f"The request turns reasoning off ({_listed(off)}) and asks for it "
            f"({_listed(wanted)}); do one of them",
            param=next(iter(wanted)),
        )


def _listed(said: Mapping[str, Any]) -> str:
    return ", ".join(f"{_written(value)} (`{name}`)" for name, value in said.items())


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
