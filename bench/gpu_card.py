"""What the card does at best, measured in the run whose rows are held against it.

Bandwidth is the larger of a copy's (bytes read and written) and of a reduction's (bytes read); the
rate is that of one large product of random matrices. Each the median of a few repeats after a
warm-up, by a synchronized wall clock: what is timed takes milliseconds, what it adds microseconds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from bench.gpu_bounds import Card

REPEATS = 9


@dataclass(frozen=True, slots=True)
class Load:
    """How much is moved, in bytes, and how wide the multiplied matrices are."""

    bytes: int
    width: int


FULL = Load(4 << 30, 8192)
SMALL = Load(1 << 20, 64)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_card(device: torch.device, load: Load) -> Card:
    return Card(bandwidth=_bandwidth(device, load.bytes), rate=_rate(device, load.width))


def _bandwidth(device: torch.device, size: int) -> float:
    numbers = torch.ones(size // 4, device=device)
    other = torch.empty_like(numbers)
    copying = _seconds(device, lambda: other.copy_(numbers))
    reading = _seconds(device, numbers.sum)
    return max(2 * size / copying, size / reading)


def _rate(device: torch.device, width: int) -> float:
    one, two = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    return 2 * width**3 / _seconds(device, lambda: one @ two)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    taken = []
    for repeat in range(REPEATS + 3):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        taken += [time.perf_counter() - started] if repeat >= 3 else []
    return median(taken)
