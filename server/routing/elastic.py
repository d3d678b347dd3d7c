"""When load is high enough that requests without a λ of their own go cheaper, and when no more.

    calm ──queue or KV at its threshold──▶ active ──both below `release` of it──▶ calm
           and never two changes within `dwell` seconds

Knows numbers and a clock; what cheaper means is decided in `server.routing.policy`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pressure:
    """The engine's load at one moment."""

    waiting: int  # requests
    kv_usage: float  # share of the blocks


@dataclass(frozen=True, slots=True)
class ElasticLimits:
    waiting: int  # requests that wait
    kv_usage: float  # share of the blocks
    release: float  # share of both limits, at or below which the pressure is over
    dwell: float  # seconds between two changes


class Elastic:
    """The state. Tell it the pressure whenever somebody asks; it needs no timer."""

    def __init__(self, limits: ElasticLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._changed: float | None = None
        self.active = False

    def update(self, pressure: Pressure) -> bool:
        """Whether requests go cheaper now."""
        changes = self._relieved(pressure) if self.active else self._pressed(pressure)
        if changes and not self._dwells():
            self.active = not self.active
            self._changed = self._clock()
        return self.active

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
        return self._changed is not None and self._clock() - self._changed < self._limits.dwell
