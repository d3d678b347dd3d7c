"""Blended weights Θ(λ), kept by (blend group, λ) within a byte budget.

An entry is filled tensor by tensor, each at the first use of its layer in a step, on the device:
fp32 lerp of both endpoints, one rounding. The least recently used entries go first; what the
running step uses is never evicted. Nothing here decides *whether* a group is blended: that is the
planner's.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

Key = tuple[str, float]  # (blend group, λ on the grid)


class Blendable(Protocol):
    """A pair of tensors that can be blended to one."""

    def blend(self, value: float) -> Tensor:
        """Θ(λ), rounded once."""
        ...


class Blend:
    """The blended weights of one group at one λ: each tensor is built at its first use."""

    __slots__ = ("_cache", "_tensors", "nbytes", "value")

    def __init__(self, cache: "BlendCache", value: float) -> None:
        self.value = value
        self.nbytes = 0
        self._cache = cache
        self._tensors: dict[Blendable, Tensor] = {}

    def get(self, source: Blendable) -> Tensor:
        tensor = self._tensors.get(source)
        if tensor is None:
            tensor = self._tensors[source] = source.blend(self.value)
            self.nbytes += tensor.nbytes
            self._cache.grow(tensor.nbytes)
        return tensor


class BlendCache:
    """`budget` in bytes; counters since start."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self.hits = 0  # entries found by a step
        self.builds = 0  # entries made
        self.evictions = 0
        self._blends: OrderedDict[Key, Blend] = OrderedDict()  # least recently used first
        self._in_use: set[Key] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._blends

    def begin_step(self) -> None:
        """What the last step used may be evicted from now on, and is where it was too much."""
        self._in_use.clear()
        self._evict()

    def use(self, key: Key) -> Blend:
        """The entry, made empty if there is none; it stays until the next `begin_step`."""
        blend = self._blends.get(key)
        if blend is None:
            blend = self._blends[key] = Blend(self, key[1])
            self.builds += 1
        else:
            self._blends.move_to_end(key)
            self.hits += 1
        self._in_use.add(key)
        return blend

    def grow(self, nbytes: int) -> None:
        """Accounts for a tensor just built, at the cost of entries that nobody uses now."""
        self.nbytes += nbytes
        self._evict()

    def missing(self, keys: Iterable[Key]) -> int:
        """How many of these entries would have to be built."""
        return sum(key not in self._blends for key in keys)

    def check_integrity(self) -> None:
        assert self.nbytes == sum(blend.nbytes for blend in self._blends.values())
        assert self._in_use <= self._blends.keys()

    def _evict(self) -> None:
        if self.nbytes <= self.budget:
            return
        for key in [key for key in self._blends if key not in self._in_use]:
            self.nbytes -= self._blends.pop(key).nbytes
            self.evictions += 1
            if self.nbytes <= self.budget:
                return
