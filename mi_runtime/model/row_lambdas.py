"""Which λ every row of the running step has, group by group, and how its weights are had.

A blend group is the parameters that share one λ: `embed`, `head`, and of each layer `N.attn` and
`N.mlp`. The rows of a group in a step go one of three ways:

    endpoint   all at λ = 0, or all at λ = 1: that endpoint's own weights, nothing else is read
               (λ = 1 is none where Thinking is kept as a rounded difference)
    blended    all at one λ, and the planner wants its blended weights
    pair       any λ values, straight from both endpoints

Swapped modules hold a `RowSlot` and read its `now`; nothing else of a step reaches them.
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
MEMO_ROWS = 256  # steps of at most so many rows keep what they derive from λ for the next step


class Way(StrEnum):
    ENDPOINT = "endpoint"
    BLENDED = "blended"
    PAIR = "pair"


class _Matrix(Protocol):
    def product(self, x: Tensor, rows: "Rows") -> Tensor: ...


class Rows:
    """The λ of the rows that a group's modules see, for as long as the batch keeps its shape.

    `live`: `lambdas` is a buffer that is written between forwards, so nothing derived is kept.
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
        self.endpoint = endpoint  # every row at this endpoint
        self.blend = blend  # every row at this blend's λ
        self.lambdas = lambdas  # [rows] fp32; [1] where all rows share one λ
        self.live = live
        self._mix: Tensor | None = None if live else _both(lambdas)
        self._memo: dict[object, Tensor] = {}
        self._matrix: _Matrix | None = None
        self._input: Tensor | None = None
        self._product = lambdas
        self._reads = 0  # of the product

    @property
    def mix(self) -> Tensor:
        """`[rows or 1, 2, 1]` fp32: (1−λ) and λ."""
        return _both(self.lambdas) if self._mix is None else self._mix

    @property
    def way(self) -> Way:
        if self.endpoint is not None:
            return Way.ENDPOINT
        return Way.PAIR if self.blend is None else Way.BLENDED

    def shared(self, matrix: "_Matrix", x: Tensor, sharers: int) -> Tensor:
        """`matrix.product(x, self)`, computed once for the modules that share the matrix.

        They read one input after another (query, key, value; gate, up): the product is kept until
        the last of the `sharers` has read it, as it is large and rows may be a layer's own. It is
        known by the identity of its input while that is kept alive. A model that wrote into an
        input between two such modules would not be served rightly; the self-check at load refuses
        it.
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
        """`make(lambdas)`, made once for as long as the rows stay as they are."""
        if self.live:
            return make(self.lambdas)
        value = self._memo.get(key)
        if value is None:
            value = make(self.lambdas)
            if len(self.lambdas) <= MEMO_ROWS:
                self._memo[key] = value
        return value

    def forget_input(self) -> None:
        self._matrix, self._input, self._product = None, None, self.lambdas
        self._reads = 0


def _both(lambdas: Tensor) -> Tensor:
    return torch.stack((1 - lambdas, lambdas), dim=1).unsqueeze(-1)


def scaled_pair(x: Tensor, mix: Tensor) -> Tensor:
    """`x` `[..., rows, in]` times each column of `mix` `[rows, 2, 1]`: `[..., rows, 2·in]`.

    The coefficients stay in fp32 and the product is rounded once: rounded themselves, (1−λ) and λ
    no longer sum to 1, a bias of up to 0.2 % in bf16 that all layers share.
    """
    return (x.unsqueeze(-2) * mix).flatten(-2).to(x.dtype)


class RowSlot:
    """Where a module finds the rows of the running step."""

    __slots__ = ("rows",)

    rows: Rows


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one forward: dials without repetition, and which one each row has."""

    dials: tuple[Dial, ...]
    index: tuple[int, ...]  # of each token's dial
    logits_indices: tuple[int, ...]  # rows with logits
    blended: bool  # a group whose rows share one λ takes blended weights


class BlendGroups:
    """All groups of one model. Most modules see every token; the head only the rows it needs."""

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
        self.endpoints = endpoints  # which λ have weights of their own
        self.executions = dict.fromkeys(Way, 0)  # of groups, since `start_counting`
        self._tokens = {name: RowSlot() for name in self.names}
        self._logits_rows = {name: RowSlot() for name in self.names}
        self._device = device
        self._last: StepRows | None = None
        self._used: dict[int, Rows] = {}
        self._ways = dict.fromkeys(Way, 0)

    def slot(self, group: str, logits_only: bool) -> RowSlot:
        return (self._logits_rows if logits_only else self._tokens)[group]

    def start_counting(self) -> None:
        """What ran until now was no request's."""
        self.executions = dict.fromkeys(Way, 0)

    def begin(self, step: StepRows) -> None:
        """Sets the rows of the next forward. A batch of the same shape as the last keeps them."""
        if step != self._last:
            self._last = None  # until all slots are set: making their tensors may fail
            self._assign(step)
            self._last = step
        else:
            self.cache.hits += self._ways[Way.BLENDED]
        for way, count in self._ways.items():
            self.executions[way] += count

    def set_rows(self, rows: Mapping[str, Rows]) -> None:
        """Sets these rows by group until the next `begin`; those with logits are all rows."""
        for name in self.names:
            self._tokens[name].rows = self._logits_rows[name].rows = rows[name]
        self._used = {id(one): one for one in rows.values()}
        self._last = None

    @property
    def current_lambdas(self) -> list[Tensor]:
        """λ of the rows that are set, `[rows]` or `[1]` each."""
        return [rows.lambdas for rows in self._used.values()]

    def count(self, way: Way) -> None:
        """Notes a forward that ran outside `begin`, all its groups one way."""
        self.executions[way] += len(self.names)

    def end(self) -> None:
        """Lets go of activations that the forward left behind."""
        for rows in self._used.values():
            rows.forget_input()

    def _assign(self, step: StepRows) -> None:
        index = on_device(step.index, torch.int64, self._device)
        logits_indices = on_device(step.logits_indices, torch.int64, self._device)
        made: dict[object, tuple[Rows, Rows]] = {}
        own = [dict(dial.groups) for dial in step.dials]
        for name in self.names:
            values = tuple(
                groups.get(name, dial.reasoning_lambda)
                for dial, groups in zip(step.dials, own, strict=True)
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
        """Of `embed` the entry stays empty: an embedding blends only the rows it looks up."""
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
