"""Intercepts every operator that torch dispatches; for benchmarks that count launches."""

from abc import abstractmethod
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class EachDispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `run` for every operator inside its context, and for the parts of composite ones."""

    @abstractmethod
    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the operator's result."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        return self.run(func, args, kwargs) if parts is NotImplemented else parts
