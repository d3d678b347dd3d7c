"""Measures the best that the card can do, in the same run as the rows that are compared with it.

Bandwidth is that of a copy, counting bytes read and written; the rate is that of one large product.
The numbers are random, because zeros run faster. Copies rotate among buffers that are larger than
the cache. Each figure is the median of a few repeats after a warm-up, in which the card reaches its
clocks. Time is a synchronized wall clock: a repeat takes milliseconds, the clock adds microseconds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from bench.gpu.bounds import Card
from bench.measuring.device import synchronize

REPEATS = 9
WARM_UP = 100
PRODUCTS = 4  # products in one repeat


@dataclass(frozen=True, slots=True)
class Load:
    """How many bytes are moved, and how wide the multiplied matrices are."""

    bytes: int  # of each buffer
    buffers: int
    width: int


FULL = Load(1 << 30, 4, 8192)
SMALL = Load(1 << 18, 4, 64)


def measure_card(device: torch.device, load: Load) -> Card:
    return Card(bandwidth=_bandwidth(device, load), rate=_rate(device, load.width))


def _bandwidth(device: torch.device, load: Load) -> float:
    size = load.bytes // torch.bfloat16.itemsize
    buffers = [
        torch.empty(size, dtype=torch.bfloat16, device=device).normal_()
        for _ in range(load.buffers)
    ]

    def copy_round() -> None:
        for one, other in zip(buffers, buffers[1:] + buffers[:1], strict=True):
            other.copy_(one)

    return 2 * load.bytes * load.buffers / _seconds(device, copy_round)


def _rate(device: torch.device, width: int) -> float:
    one, two = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    seconds = _seconds(device, lambda: [one @ two for _ in range(PRODUCTS)])
    return PRODUCTS * 2 * width**3 / seconds


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    taken = []
    for repeat in range(WARM_UP + REPEATS):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        taken += [time.perf_counter() - started] if repeat >= WARM_UP else []
    return median(taken)
