"""Measures free memory and the peak of loading, and returns freed memory to the system."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MIB = 2**20


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Inside the context, memory of freed tensors is returned to the system at once.

    glibc raises its threshold for mapped allocations to the largest one that it has freed. Weights
    that are freed while larger ones are allocated then leave holes, in total a third copy of a
    model. Afterwards the threshold is high, as glibc would set it, so that activations are not
    mapped each time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # only glibc has it
    mallopt(M_MMAP_THRESHOLD, MIB)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        mallopt(M_TRIM_THRESHOLD, 64 * MIB)


class MemoryPeak:
    """Keeps the most memory, in bytes, that a call of `look` has found."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._held()
        self.peak = 0

    def look(self) -> None:
        """Measures the memory held now."""
        self.peak = max(self.peak, self._held() - self._before)

    def _held(self) -> int:
        """Returns the bytes that this process holds, without pages of mapped files."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.partition("RssAnon:")[2].split()[0]) * 1024
        except (OSError, IndexError):  # not Linux, or without this field
            return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """Returns the free memory in bytes, on a CPU within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(int(psutil.virtual_memory().available), _left_in_container())


def _left_in_container(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the bytes left in this control group (v2), or `sys.maxsize` without a limit."""
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is no limit
        return max(0, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return sys.maxsize
