"""Decides which products of a model run as Triton kernels, and calls these.

All matrices of a model share one `KernelDispatch`. It is off until `enable` is called with the
number of rows up to which the kernels were measured to be faster than cuBLAS. Triton is imported
then, and not before.
"""

from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from mi_runtime.kernels.pair_linear import Alignment


class KernelDispatch:
    """The kernels of `pair_linear`, and the row limit up to which they are used."""

    def __init__(self) -> None:
        self.rows = 0  # dense products of up to this many rows use kernels
        self.experts = False  # experts use kernels for any number of rows
        self._kernels: ModuleType | None = None

    def enable(self, rows: int, experts: bool = True) -> None:
        """Uses kernels for dense products of up to `rows` rows, and for experts."""
        from mi_runtime.kernels import pair_linear

        self._kernels, self.rows, self.experts = pair_linear, rows, experts

    def takes(self, x: Tensor) -> bool:
        """Whether a kernel computes the dense product of `x` `[..., rows, in]`."""
        return self.rows > 0 and x.numel() <= self.rows * x.shape[-1]

    def pair(self, x: Tensor, instruct: Tensor, thinking: Tensor, lambdas: Tensor) -> Tensor:
        """Calls `pair_linear` with `x` `[..., rows, in]`; leading dimensions must be 1."""
        assert self._kernels is not None
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = self._kernels.pair_linear(flat, instruct, thinking, lambdas)
        return out.view(*x.shape[:-1], len(instruct))

    def delta(
        self, x: Tensor, base: Tensor, delta: Tensor, scales: Tensor, lambdas: Tensor
    ) -> Tensor:
        """Calls `delta_linear` with `x` `[..., rows, in]`; leading dimensions must be 1."""
        assert self._kernels is not None
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = self._kernels.delta_linear(flat, base, delta, scales, lambdas)
        return out.view(*x.shape[:-1], len(base))

    def align(self, expert_ids: Tensor, experts: int) -> "Alignment":
        """Sorts the rows of `expert_ids` `[rows, top_k]` by expert."""
        assert self._kernels is not None
        alignment: Alignment = self._kernels.align(expert_ids, experts)
        return alignment

    def grouped(
        self,
        x: Tensor,
        matrices: tuple[Tensor, Tensor | None, Tensor | None],
        biases: Tensor | None,
        lambdas: Tensor,
        alignment: "Alignment",
        gather: bool,
    ) -> Tensor:
        """Calls `grouped_linear`; `matrices` are first, second and scales."""
        assert self._kernels is not None
        out: Tensor = self._kernels.grouped_linear(
            x, *matrices, biases, lambdas, alignment, gather=gather
        )
        return out
