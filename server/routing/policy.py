"""What λ a request runs at, all things said: its own λ, its budget or effort, the server's default,
and the load. The answer tells every decision.

Without a profile of the pair nothing is known about tokens or score, and nothing is claimed: an
effort then is a place along λ, a budget is a cap on the default λ, and load changes nothing.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from mi_runtime.request import Dial
from server.routing.dial import DEFAULT, Routing
from server.routing.observations import Observations
from server.routing.profiles import DEFAULT_CLASS, Profile
from server.routing.reasoning_options import EFFORT_SHARES, NONE, ReasoningInputs
from server.routing.table import Lengths, Observed, RoutingTable, nothing_observed

NEUTRAL: Final = "neutral"
"""Name that stands for the profile of a pair nobody measured."""
BUDGET: Final = "budget"
EFFORT: Final = "effort"
ENABLE_THINKING: Final = "enable_thinking"
REBUILD_SECONDS: Final = 30.0  # between two looks at what was observed


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """What the operator decides."""

    default: float  # λ
    step: float  # of the λ grid
    think_threshold: float  # highest λ that takes Instruct's template
    elastic_effort: float = 1.0  # most of the gain that is bought under load
    adapt_min_samples: int | None = None  # in a bucket; None: observations decide nothing


class RoutingPolicy:
    """The decisions of one server. Only what was observed changes them."""

    def __init__(
        self,
        profile: Profile | None,
        settings: RoutingSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.profile = profile
        self.settings = settings
        self.observations = Observations(profile.classes if profile else (DEFAULT_CLASS,))
        self._clock = clock
        self.rebuild()

    @property
    def name(self) -> str:
        return NEUTRAL if self.profile is None else self.profile.name

    def route(
        self, asked: Routing, inputs: ReasoningInputs, *, under_load: bool = False
    ) -> Routing:
        """`asked`, with the λ of `inputs` where it has none of its own, and the cap."""
        routing_class = self.class_of(inputs.routing_class)
        table = self.tables.get(routing_class)
        routing = replace(asked, profile=self.name, routing_class=routing_class, cap=inputs.budget)
        if asked.source == DEFAULT:
            routing = self._choose(routing, inputs, table)
            if under_load and table is not None and not inputs.off:
                routing = self._cheaper(routing, table)
        return replace(routing, expected=_expected(routing, table))

    def class_of(self, name: str) -> str:
        """The class whose curve applies to work of this name."""
        known = self.profile is not None and name in self.profile.classes
        return name if known else DEFAULT_CLASS

    @property
    def tables(self) -> Mapping[str, RoutingTable]:
        """By class; none without a profile. Made anew now and then where observations count."""
        due = self._built + REBUILD_SECONDS
        if self.settings.adapt_min_samples is not None and self._clock() >= due:
            self.rebuild()
        return self._tables

    def rebuild(self) -> None:
        """Make the tables from the profile and what was observed until now."""
        self._tables, self._built = self._build(), self._clock()

    def _choose(
        self, routing: Routing, inputs: ReasoningInputs, table: RoutingTable | None
    ) -> Routing:
        source, value = self._chosen(inputs, table)
        return replace(routing, dials=(self._dial(value),), source=source)

    def _chosen(self, inputs: ReasoningInputs, table: RoutingTable | None) -> tuple[str, float]:
        """Source and λ: off, else budget > effort > on > default."""
        if inputs.off:
            return (EFFORT if inputs.effort == NONE else ENABLE_THINKING), 0.0
        if inputs.budget is not None:
            if table is None:
                return BUDGET, self._thinking(table)
            return BUDGET, table.by_budget(inputs.budget).reasoning_lambda
        if inputs.share is not None:
            return EFFORT, _by_effort(inputs.share, table)
        if inputs.thinks:
            return ENABLE_THINKING, self._thinking(table)
        return DEFAULT, self.settings.default

    def _thinking(self, table: RoutingTable | None) -> float:
        """The λ of thinking without saying how much: the default, where that thinks."""
        if self.settings.default > self.settings.think_threshold:
            return self.settings.default
        return _by_effort(EFFORT_SHARES["medium"], table)

    def _cheaper(self, routing: Routing, table: RoutingTable) -> Routing:
        """The stop of the operator's effort, unless that is known to be dearer."""
        stop = table.by_effort(self.settings.elastic_effort)
        expected = table.mean_at(routing.dials[0].reasoning_lambda)
        if expected is not None and stop.mean >= expected:
            return routing
        return replace(routing, dials=(self._dial(stop.reasoning_lambda),), elastic=True)

    def _dial(self, value: float) -> Dial:
        return Dial.on_grid(value, self.settings.step)

    def _build(self) -> dict[str, RoutingTable]:
        classes = self.profile.classes if self.profile else {}
        step = self.settings.step
        return {
            name: RoutingTable(measured, step=step, observed=self._observed(name))
            for name, measured in classes.items()
        }

    def _observed(self, routing_class: str) -> Observed:
        least = self.settings.adapt_min_samples
        if least is None:
            return nothing_observed

        def lengths(value: float) -> Lengths | None:
            digest = self.observations.at(routing_class, value)
            mean, p90 = digest.mean, digest.quantile(0.9)
            if digest.samples < least or mean is None or p90 is None:
                return None
            return Lengths(mean, p90, "observed")

        return lengths


def _by_effort(share: float, table: RoutingTable | None) -> float:
    return share if table is None else table.by_effort(share).reasoning_lambda


def _expected(routing: Routing, table: RoutingTable | None) -> float | None:
    """Mean reasoning tokens of the one λ of the request, the cap considered."""
    dial = routing.dials[0]
    if table is None or routing.fan_out or dial.groups:
        return None
    mean = table.mean_at(dial.reasoning_lambda)
    if mean is None or routing.cap is None:
        return mean
    return min(mean, float(routing.cap))
