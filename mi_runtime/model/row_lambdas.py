"""Holds, by blend group, the λ of every row of the running step, and the way to compute them.

A blend group is the parameters that share one λ: `embed`, `head`, and for each layer N, `N.attn`
and `N.mlp`. In a step, the rows of a group are computed in one of three ways:

    endpoint   all at λ = 0, or all at λ = 1: only that endpoint's weights are read
               (λ = 1 is no endpoint if Thinking is stored as a rounded difference)
    blended    all at one λ, for which the planner chose blended weights
    pair       any λ values: the product with both endpoints

Every swapped module has a `RowSlot`, whose `rows` are all that it knows of the step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from mi_runtime.device.transfer import on_device
from mi_runtime.model.blend_cache import Blend, BlendCache
from mi_runtime.request import Dial

INSTRUCT, THINKING = 0, 1
ENDPOINTS = {0.0: INSTRUCT, 1.0: THINKING}
MEMO_ROWS = 256  # up to this many rows, values derived from λ are kept for the next step


class Way(StrEnum):
    """How the weights of a blend group are computed in a forward pass."""

    ENDPOINT = "endpoint"
    BLENDED = "blended"
    PAIR = "pair"


class _Matrix(Protocol):
    def product(self, x: Tensor, rows: "Rows") -> Tensor: ...


class Rows:
    """The λ of the rows that a group's modules compute, valid while the batch keeps its dials.

    With `live`, `lambdas` is a buffer that is rewritten between forward passes, so that no derived
    values are kept.
    """

    __slots__ = (
        "_input",
        "_matrix",
        "_memo",
        "_mix",
        "_product",
        "_reads",
        "blend",
        "endpoint",
        "lambdas",
        "live",
    )

    def __init__(
        self,
        lambdas: Tensor,
        endpoint: int | None,
        blend: Blend | None = None,
        live: bool = False,
    ) -> None:
        self.endpoint = endpoint  # all rows are at this endpoint
        self.blend = blend  # all rows are at the λ of this blend
        self.lambdas = lambdas  # [rows] fp32; [1] where all rows share one λ
        self.live = live
        self._mix: Tensor | None = None if live else _both(lambdas)
        self._memo: dict[object, Tensor] = {}
        self._matrix: _Matrix | None = None
        self._input: Tensor | None = None
        self._product = lambdas
        self._reads = 0  # how many modules have read the product

    @property
    def mix(self) -> Tensor:
        """(1−λ) and λ of each row, fp32 `[rows or 1, 2, 1]`."""
        return _both(self.lambdas) if self._mix is None else self._mix

    @property
    def way(self) -> Way:
        """The way in which these rows are computed."""
        if self.endpoint is not None:
            return Way.ENDPOINT
        return Way.PAIR if self.blend is None else Way.BLENDED

    def shared(self, matrix: "_Matrix", x: Tensor, sharers: int) -> Tensor:
        """Returns `matrix.product(x, self)`, computed once for the modules that share the matrix.

        These modules (query, key, value; gate, up) run one after another on one input. Since the
        product is large, it is kept only until the last of the `sharers` has read it. It is
        identified by its input object, which is kept alive until then. A model that writes to the
        input between two such modules would get wrong results; the self-check at load refuses it.
        """
        if self._matrix is not matrix or self._input is not x:
            self._product = matrix.product(x, self)
            self._matrix, self._input, self._reads = matrix, x, 0
        self._reads += 1
        product = self._product
        if self._reads == sharers:
            self.forget_input()
        return product

    def derived(self, key: object, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns `make(lambdas)`, computed once as long as the rows do not change."""
        if self.live:
            return make(self.lambdas)
        value = self._memo.get(key)
        if value is None:
            value = make(self.lambdas)
            if len(self.lambdas) <= MEMO_ROWS:
                self._memo[key] = value
        return value

    def forget_input(self) -> None:
        """Drops the product and the input that `shared` keeps."""
        self._matrix, self._input, self._product = None, None, self.lambdas
        self._reads = 0


def _both(lambdas: Tensor) -> Tensor:
    return torch.stack((1 - lambdas, lambdas), dim=1).unsqueeze(-1)


def scaled_pair(x: Tensor, mix: Tensor) -> Tensor:
    """Returns `[(1−λ)x ; λx]`, `[..., rows, 2·in]`, of `x` `[..., rows, in]`.

    `mix` is `[rows, 2, 1]`. The coefficients stay in fp32 and the product is rounded once. Rounded
    coefficients would not sum to 1: in bf16 a bias of up to 0.2 %, which all layers share.
    """
    return (x.unsqueeze(-2) * mix).flatten(-2).to(x.dtype)


class RowSlot:
    """Holds the rows of the running step for the modules of one blend group."""

    __slots__ = ("rows",)

    rows: Rows


@dataclass(frozen=True, slots=True)
class StepRows:
    """The dials of one forward pass, without repetition, and the dial of each row."""

    dials: tuple[Dial, ...]
    index: tuple[int, ...]  # the dial of each row
    logits_indices: tuple[int, ...]  # rows that need logits
    blended: bool  # groups whose rows all have one λ use blended weights


class BlendGroups:
    """The blend groups of one model.

    Most modules compute all rows of a batch; the head computes only those that need logits.
    """

    def __init__(
        self,
        layers: int,
        device: torch.device,
        cache: BlendCache,
        endpoints: Mapping[float, int] = ENDPOINTS,
    ) -> None:
        names = [f"{layer}.{part}" for layer in range(layers) for part in ("attn", "mlp")]
        self.names = ("embed", *names, "head")
        self.cache = cache
        self.endpoints = endpoints  # the λ values that need no blending, with their endpoint
        self.executions = dict.fromkeys(Way, 0)  # groups computed since `start_counting`
        self._tokens = {name: RowSlot() for name in self.names}
        self._logits_rows = {name: RowSlot() for name in self.names}
        self._device = device
        self._last: StepRows | None = None
        self._used: dict[int, Rows] = {}
        self._ways = dict.fromkeys(Way, 0)

    def slot(self, group: str, logits_only: bool) -> RowSlot:
        """Returns the slot for modules that compute all rows, or only those with logits."""
        return (self._logits_rows if logits_only else self._tokens)[group]

    def start_counting(self) -> None:
        """Resets the execution counts: what ran before was not for requests."""
        self.executions = dict.fromkeys(Way, 0)

    def begin(self, step: StepRows) -> None:
        """Sets the rows of the next forward pass, unless they equal those of the last one."""
        if step != self._last:
            self._last = None  # in case allocating the tensors fails
            self._assign(step)
            self._last = step
        else:
            self.cache.hits += self._ways[Way.BLENDED]
        for way, count in self._ways.items():
            self.executions[way] += count

    def set_rows(self, rows: Mapping[str, Rows]) -> None:
        """Sets these rows, by group, until the next `begin`; all of them need logits."""
        for name in self.names:
            self._tokens[name].rows = self._logits_rows[name].rows = rows[name]
        self._used = {id(one): one for one in rows.values()}
        self._last = None

    @property
    def current_lambdas(self) -> list[Tensor]:
        """The λ tensors of the current rows, each `[rows]` or `[1]`."""
        return [rows.lambdas for rows in self._used.values()]

    def count(self, way: Way) -> None:
        """Counts a forward pass that ran without `begin`, with all groups computed in this way."""
        self.executions[way] += len(self.names)

    def end(self) -> None:
        """Drops the activations that `Rows.shared` still holds after a forward pass."""
        for rows in self._used.values():
            rows.forget_input()

    def _assign(self, step: StepRows) -> None:
        index = on_device(step.index, torch.int64, self._device)
        logits_indices = on_device(step.logits_indices, torch.int64, self._device)
        made: dict[object, tuple[Rows, Rows]] = {}
        group_values = [dict(dial.groups) for dial in step.dials]
        for name in self.names:
            values = tuple(
                groups.get(name, dial.reasoning_lambda)
                for dial, groups in zip(step.dials, group_values, strict=True)
            )
            uniform = len(set(values)) == 1
            blend = self._blend(name, values[0]) if uniform and step.blended else None
            key = values if blend is None else (name, values)
            if key not in made:
                made[key] = self._rows(values, index, logits_indices, uniform, blend)
            self._tokens[name].rows, self._logits_rows[name].rows = made[key]
        self._used = {id(rows): rows for both in made.values() for rows in both}
        ways = [slot.rows.way for slot in self._tokens.values()]
        self._ways = {way: ways.count(way) for way in Way}

    def _blend(self, name: str, value: float) -> Blend | None:
        """Returns the blend cache entry, except for endpoints.

        The entry of `embed` stays empty, because an embedding blends only the rows it looks up.
        """
        return None if value in self.endpoints else self.cache.use((name, value))

    def _rows(
        self,
        values: tuple[float, ...],
        index: Tensor,
        logits_indices: Tensor,
        uniform: bool,
        blend: Blend | None,
    ) -> tuple[Rows, Rows]:
        lambdas = on_device(values[:1] if uniform else values, torch.float32, self._device)
        if uniform:
            rows = Rows(lambdas, self.endpoints.get(values[0]), blend)
            return rows, rows
        lambdas = lambdas.index_select(0, index)
        return Rows(lambdas, None), Rows(lambdas.index_select(0, logits_indices), None)
