"""Blended weights Θ(λ): of every blend group, those of the last few λ values.

An entry is filled tensor by tensor, each at the first use of its layer, on the device: fp32 lerp of
both endpoints, one rounding. A group has a fixed number of places; an entry that must give way
leaves its memory, at the same addresses, to the one that takes its place: a recorded forward may
read a place whatever λ lies there. Forwards run one after another, so a place may be given away as
soon as the forward that reads it was launched. Nothing here decides *whether* a group is blended:
that is the planner's.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

Key = tuple[str, float]  # (blend group, λ on the grid)


class Blendable(Protocol):
    """A pair of tensors that can be blended to one."""

    name: str  # unique in its group, and the same in all layers; empty: known by its identity

    def blend(self, value: float, out: Tensor | None = None) -> Tensor:
        """Θ(λ), rounded once; written into `out` where there is one."""
        ...


class Blend:
    """A place of one group: its tensors, and the λ they are blended at."""

    __slots__ = ("_built", "_room", "place", "value")

    def __init__(self, place: int, value: float) -> None:
        self.place = place
        self.value = value
        self._room: dict[object, Tensor] = {}  # written at some λ
        self._built: dict[object, Tensor] = {}  # at this one

    def get(self, source: Blendable) -> Tensor:
        key = source.name or source  # by name, all layers find theirs by the same compiled code
        tensor = self._built.get(key)
        if tensor is None:
            tensor = source.blend(self.value, self._room.get(key))
            self._room[key] = self._built[key] = tensor
        return tensor

    def assign(self, value: float) -> None:
        self.value = value
        self._built.clear()

    @property
    def complete(self) -> bool:
        """Whether all that was ever built here is built at this λ."""
        return len(self._built) == len(self._room)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._room.values())


class BlendCache:
    """`places`: λ values that a group holds at once; one that is used has one, whatever it says.

    Counters since start.
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
        """Of all places, whether what lies there is wanted or not."""
        kept = (blend for group in self._blends.values() for blend in group.values())
        empty = (blend for group in self._empty.values() for blend in group)
        return sum(blend.nbytes for blends in (kept, empty) for blend in blends)

    def use(self, key: Key) -> Blend:
        """The entry, made unbuilt if there is none."""
        group, value = key
        blends = self._blends[group]
        blend = blends.get(value)
        if blend is None:
            self.builds += 1
            blend = blends[value] = self._room(group, value)
        else:
            self.hits += 1
            blends.move_to_end(value)
        return blend

    def missing(self, keys: Iterable[Key]) -> int:
        """How many of these entries would have to be built."""
        return sum(key not in self for key in keys)

    def common_place(self, keys: Iterable[Key]) -> int | None:
        """The one place where all these entries lie, whole; None where there is no such."""
        found = [self._blends[group].get(value) for group, value in keys]
        places = {blend.place if blend is not None and blend.complete else None for blend in found}
        return places.pop() if len(places) == 1 else None

    def forget(self) -> None:
        """Empties all places, which keep their memory, and starts counting anew."""
        for group, blends in self._blends.items():
            self._empty[group] += sorted(
                blends.values(), key=lambda blend: blend.place, reverse=True
            )
            blends.clear()
        self.hits = self.builds = self.evictions = 0

    def check_integrity(self) -> None:
        for group, blends in self._blends.items():
            places = [blend.place for blend in (*blends.values(), *self._empty[group])]
            assert sorted(places) == [*range(len(places))]
            assert len(places) <= max(1, self.places)
            assert all(blend.value == value for value, blend in blends.items())

    def _room(self, group: str, value: float) -> Blend:
        """An empty place, a new one, or that of the least recently used."""
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
