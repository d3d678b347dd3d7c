"""What memory is free, what loading takes of it, and how freed weights go back."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
MIB = 2**20


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Inside, freed tensors go back to the system one by one.

    glibc raises its threshold for mapped allocations to the largest it freed; weights that are
    freed while larger ones are made then leave holes, a third copy of a model in all. Afterwards
    the threshold is where glibc would have it, high, so that activations are not mapped each time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc has it
    mallopt(M_MMAP_THRESHOLD, MIB)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        mallopt(M_TRIM_THRESHOLD, 64 * MIB)


class MemoryPeak:
    """Most memory held since it was made, in bytes, of those moments at which it looked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._held()
        self.peak = 0

    def look(self) -> None:
        self.peak = max(self.peak, self._held() - self._before)

    def _held(self) -> int:
        """What this process holds; pages of mapped files are the kernel's to take back."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.partition("RssAnon:")[2].split()[0]) * 1024
        except (OSError, IndexError):  # not Linux, or not all of it
            return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """Memory that nothing holds now, in bytes; on a CPU within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(int(psutil.virtual_memory().available), _left_in_container())


def _left_in_container(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes to the limit of this control group (v2); more than any machine has, where none is."""
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is no limit
        return max(0, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return sys.maxsize
