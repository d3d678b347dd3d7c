"""Decides the λ that a request runs at, from its own λ, its budget or effort, the server's default
and the load. The answer reports every decision.

Without a profile of the pair nothing is known about tokens or scores. Then the share of an effort
is used as λ, a budget is only a cap at the default λ, and load changes nothing.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from mi_runtime.request import Dial
from server.routing.observed_lengths import ObservedLengths
from server.routing.profiles import DEFAULT_CLASS, Profile
from server.routing.reasoning_options import EFFORT_SHARES, NONE, ReasoningOptions
from server.routing.requested_lambda import DEFAULT, RequestedDials
from server.routing.routing_decision import RoutingDecision
from server.routing.routing_table import (
    ExpectedLengths,
    LengthsAt,
    RoutingTable,
    nothing_observed,
)

NEUTRAL: Final = "neutral"
"""The profile name that is reported for a pair that has no profile."""
BUDGET: Final = "budget"
EFFORT: Final = "effort"
ENABLE_THINKING: Final = "enable_thinking"
REBUILD_SECONDS: Final = 30.0  # minimum time between two rebuilds from observed lengths


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """What the operator configures."""

    default: float  # λ
    step: float  # of the λ grid
    think_threshold: float  # highest λ that takes Instruct's template
    elastic_effort: float = 1.0  # highest effort under load, as a share of the gain, 0 to 1
    adapt_min_samples: int | None = None  # in a bucket; None: observed lengths are not used


class RoutingPolicy:
    """Makes the decisions of one server. Only observed lengths change how it decides."""

    def __init__(
        self,
        profile: Profile | None,
        settings: RoutingSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.profile = profile
        self.settings = settings
        self.observed_lengths = ObservedLengths(profile.classes if profile else (DEFAULT_CLASS,))
        self._clock = clock
        self._tables: Mapping[str, RoutingTable]
        self._built_at: float  # by the clock
        self.rebuild()

    @property
    def name(self) -> str:
        """The profile's name."""
        return NEUTRAL if self.profile is None else self.profile.name

    def decide(
        self, requested: RequestedDials, options: ReasoningOptions, *, under_load: bool = False
    ) -> RoutingDecision:
        """Returns the dials of `requested`, or of `options` if it names no λ, and the cap."""
        routing_class = self.class_of(options.routing_class)
        table = self.tables.get(routing_class)
        decision = RoutingDecision(
            requested.dials,
            requested.source,
            fan_out=requested.fan_out,
            answer_dial=requested.answer_dial,
            cap=options.budget,
            layers=requested.layers,
            profile=self.name,
            routing_class=routing_class,
        )
        if requested.source == DEFAULT:
            decision = self._choose(decision, options, table)
            if under_load and table is not None and not options.off:
                decision = self._cheaper(decision, table)
        return replace(decision, expected=_expected(decision, table))

    def class_of(self, name: str) -> str:
        """Returns the routing class whose curve applies to work of this name."""
        known = self.profile is not None and name in self.profile.classes
        return name if known else DEFAULT_CLASS

    @property
    def tables(self) -> Mapping[str, RoutingTable]:
        """The table of each routing class; empty without a profile.

        If observed lengths are used, the tables are rebuilt every `REBUILD_SECONDS`.
        """
        due = self._built_at + REBUILD_SECONDS
        if self.settings.adapt_min_samples is not None and self._clock() >= due:
            self.rebuild()
        return self._tables

    def rebuild(self) -> None:
        """Makes the tables from the profile and the lengths observed until now."""
        self._tables, self._built_at = self._build(), self._clock()

    def _choose(
        self, decision: RoutingDecision, options: ReasoningOptions, table: RoutingTable | None
    ) -> RoutingDecision:
        source, value = self._source_and_lambda(options, table)
        return replace(decision, dials=(self._dial(value),), source=source)

    def _source_and_lambda(
        self, options: ReasoningOptions, table: RoutingTable | None
    ) -> tuple[str, float]:
        """Returns source and λ of the first option that is given, in the order off, budget, effort,
        on, default."""
        if options.off:
            return (EFFORT if options.effort == NONE else ENABLE_THINKING), 0.0
        if options.budget is not None:
            if table is None:
                return BUDGET, self._thinking_lambda(table)
            return BUDGET, table.by_budget(options.budget).reasoning_lambda
        if options.share is not None:
            return EFFORT, _by_effort(options.share, table)
        if options.thinks:
            return ENABLE_THINKING, self._thinking_lambda(table)
        return DEFAULT, self.settings.default

    def _thinking_lambda(self, table: RoutingTable | None) -> float:
        """Returns the λ for thinking on without budget or effort: the default λ if it is above the
        think threshold, otherwise that of medium effort."""
        if self.settings.default > self.settings.think_threshold:
            return self.settings.default
        return _by_effort(EFFORT_SHARES["medium"], table)

    def _cheaper(self, decision: RoutingDecision, table: RoutingTable) -> RoutingDecision:
        """Returns the decision with the λ of --elastic-effort, if that is cheaper."""
        candidate = table.by_effort(self.settings.elastic_effort)
        expected = table.mean_at(decision.dials[0].reasoning_lambda)
        if expected is not None and candidate.mean >= expected:
            return decision
        return replace(decision, dials=(self._dial(candidate.reasoning_lambda),), elastic=True)

    def _dial(self, value: float) -> Dial:
        return Dial.on_grid(value, self.settings.step)

    def _build(self) -> dict[str, RoutingTable]:
        classes = self.profile.classes if self.profile else {}
        step = self.settings.step
        return {
            name: RoutingTable(measured, step=step, observed=self._observed(name))
            for name, measured in classes.items()
        }

    def _observed(self, routing_class: str) -> LengthsAt:
        least = self.settings.adapt_min_samples
        if least is None:
            return nothing_observed

        def lengths_at(value: float) -> ExpectedLengths | None:
            digest = self.observed_lengths.at(routing_class, value)
            mean, p90 = digest.mean, digest.quantile(0.9)
            if digest.samples < least or mean is None or p90 is None:
                return None
            return ExpectedLengths(mean, p90, "observed")

        return lengths_at


def _by_effort(share: float, table: RoutingTable | None) -> float:
    return share if table is None else table.by_effort(share).reasoning_lambda


def _expected(decision: RoutingDecision, table: RoutingTable | None) -> float | None:
    """Returns the mean reasoning tokens, at most the cap.

    None for a fan-out and for λ by blend group, and if nothing was measured.
    """
    dial = decision.dials[0]
    if table is None or decision.fan_out or dial.groups:
        return None
    mean = table.mean_at(dial.reasoning_lambda)
    if mean is None or decision.cap is None:
        return mean
    return min(mean, float(decision.cap))
