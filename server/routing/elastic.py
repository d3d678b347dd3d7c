"""Decides when load is so high that requests that name no λ get a cheaper one.

    calm ──queue or KV at its limit──▶ active ──both below `release` of it──▶ calm
           and never two changes within `dwell` seconds

It knows only numbers and a clock; `server.routing.routing_policy` decides what is cheaper.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pressure:
    """The engine's load at one moment."""

    waiting: int  # requests
    kv_usage: float  # share of the blocks, 0 to 1


@dataclass(frozen=True, slots=True)
class ElasticLimits:
    """The loads at which the switch turns on and off, as the operator sets them."""

    waiting: int  # requests
    kv_usage: float  # share of the blocks, 0 to 1
    release: float  # share of both limits at or below which the pressure is over
    dwell: float  # seconds between two changes


class ElasticSwitch:
    """Says whether requests get a cheaper λ now. It changes only in `update`, without a timer."""

    def __init__(self, limits: ElasticLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._changed_at: float | None = None  # by the clock; None before the first change
        self.active = False

    def update(self, pressure: Pressure) -> bool:
        """Takes the present pressure into account, and returns whether the switch is active."""
        active = self.active_under(pressure)
        if active is not self.active:
            self.active, self._changed_at = active, self._clock()
        return active

    def active_under(self, pressure: Pressure) -> bool:
        """Returns what `update` would return, and changes nothing."""
        changes = self._relieved(pressure) if self.active else self._pressed(pressure)
        return self.active is not (changes and not self._dwells())

    def _pressed(self, pressure: Pressure) -> bool:
        limits = self._limits
        return pressure.waiting >= limits.waiting or pressure.kv_usage >= limits.kv_usage

    def _relieved(self, pressure: Pressure) -> bool:
        limits = self._limits
        return (
            pressure.waiting <= limits.release * limits.waiting
            and pressure.kv_usage <= limits.release * limits.kv_usage
        )

    def _dwells(self) -> bool:
        """Whether the last change is less than `dwell` seconds ago."""
        changed = self._changed_at
        return changed is not None and self._clock() - changed < self._limits.dwell
