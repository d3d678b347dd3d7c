"""Caches blended weights Θ(λ): for every blend group, those of the most recently used λ values.

An entry is built tensor by tensor, each when its layer first uses it, on the device: an fp32 lerp
of both endpoints, rounded once. A group has a fixed number of places. A new entry takes over the
memory of the evicted one at the same addresses, so that a captured forward pass can read a place
whatever λ it holds. Forward passes run one after another, so a place may be reused as soon as the
forward pass that reads it is launched. The planner decides *whether* a group uses blended weights.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

Key = tuple[str, float]  # (blend group, λ on the grid)


class Blendable(Protocol):
    """A pair of tensors that can be blended into one."""

    name: str  # unique in its group, equal in all layers; if empty, the object is the key

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        """Returns Θ(λ), rounded once; writes it to `out` if given."""
        ...


class Blend:
    """A place of one blend group: its tensors, and the λ at which they are blended."""

    __slots__ = ("_allocated", "_built", "place", "value")

    def __init__(self, place: int, value: float) -> None:
        self.place = place
        self.value = value
        self._allocated: dict[object, Tensor] = {}  # built at this or an earlier λ
        self._built: dict[object, Tensor] = {}  # built at this λ

    def get(self, source: Blendable) -> Tensor:
        """Returns the blend of `source` at this place's λ, building it at its first use."""
        key = source.name or source  # names let all layers share compiled code
        tensor = self._built.get(key)
        if tensor is None:
            tensor = source.blend(self.value, self._allocated.get(key))
            self._allocated[key] = self._built[key] = tensor
        return tensor

    def assign(self, value: float) -> None:
        """Gives the place to another λ; its tensors are built again."""
        self.value = value
        self._built.clear()

    @property
    def complete(self) -> bool:
        """Whether every allocated tensor is built at this λ."""
        return len(self._built) == len(self._allocated)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._allocated.values())


class BlendCache:
    """The cache. `places` is the number of λ values that a group holds, but at least one.

    `hits`, `builds` and `evictions` count since start.
    """

    def __init__(self, places: int = 0) -> None:
        self.places = places
        self.hits = 0  # entries found
        self.builds = 0  # entries made
        self.evictions = 0
        self._blends: defaultdict[str, OrderedDict[float, Blend]]  # least recently used first
        self._blends = defaultdict(OrderedDict)
        self._empty: defaultdict[str, list[Blend]] = defaultdict(list)

    def __contains__(self, key: Key) -> bool:
        return key[1] in self._blends[key[0]]

    @property
    def nbytes(self) -> int:
        """The bytes of all places, including empty ones."""
        used = (blend for group in self._blends.values() for blend in group.values())
        empty = (blend for group in self._empty.values() for blend in group)
        return sum(blend.nbytes for blends in (used, empty) for blend in blends)

    def use(self, key: Key) -> Blend:
        """Returns the entry of a group and λ, creating it (not built yet) if there is none."""
        group, value = key
        blends = self._blends[group]
        blend = blends.get(value)
        if blend is None:
            self.builds += 1
            blend = blends[value] = self._take_place(group, value)
        else:
            self.hits += 1
            blends.move_to_end(value)
        return blend

    def missing(self, keys: Iterable[Key]) -> int:
        """Returns how many of these entries do not exist."""
        return sum(key not in self for key in keys)

    def common_place(self, keys: Iterable[Key]) -> int | None:
        """Returns the place that all these entries share, if all are complete, else None."""
        found = [self._blends[group].get(value) for group, value in keys]
        places = {blend.place if blend is not None and blend.complete else None for blend in found}
        return places.pop() if len(places) == 1 else None

    def forget(self) -> None:
        """Empties all places, which keep their memory, and resets the counters."""
        for group, blends in self._blends.items():
            self._empty[group] += sorted(
                blends.values(), key=lambda blend: blend.place, reverse=True
            )
            blends.clear()
        self.hits = self.builds = self.evictions = 0

    def check_integrity(self) -> None:
        """Asserts every invariant of the cache."""
        for group, blends in self._blends.items():
            places = [blend.place for blend in (*blends.values(), *self._empty[group])]
            assert sorted(places) == [*range(len(places))]
            assert len(places) <= max(1, self.places)
            assert all(blend.value == value for value, blend in blends.items())

    def _take_place(self, group: str, value: float) -> Blend:
        """Returns an empty place, a new one, or the least recently used one."""
        blends, empty = self._blends[group], self._empty[group]
        if empty:
            blend = empty.pop()
        elif not blends or len(blends) < self.places:
            return Blend(len(blends), value)
        else:
            _, blend = blends.popitem(last=False)
            self.evictions += 1
        blend.assign(value)
        return blend
