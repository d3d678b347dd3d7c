"""What crosses between host and device in a step: small things, few copies, one wait.

What the host knows goes to the device through pinned memory, and nobody waits for it; what it wants
to know comes back in a single copy, and is waited for when it is read. Pinned memory is torch's:
its allocator hands a piece out again when the copies of it are done, so no step writes over what
an earlier one still reads. Knows nothing of what the numbers mean.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNED = 4  # elements: a tensor begins at a multiple of 16 bytes, as kernels are compiled for


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device as soon as what is computed there comes to it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of these numbers, or rows of numbers; sent in one copy."""
    return send(torch.tensor(values, dtype=dtype), device)


def together_on_device(
    lists: Iterable[Sequence[Any]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """The tensor of each list, all sent in one copy."""
    flat: list[Any] = []
    bounds = []
    for values in lists:
        bounds.append((len(flat), len(flat) + len(values)))
        flat += values
        flat += [0] * (-len(flat) % ALIGNED)
    sent = on_device(flat, dtype, device)
    return [sent[first:end] for first, end in bounds]


class Readback:
    """Results on their way to the host: int32 or fp32 tensors in one copy.

    The copy stands behind everything that was launched on the device before it.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._forms = [(tensor.dtype, tensor.shape) for tensor in tensors]
        words = [tensor.flatten().view(torch.int32) for tensor in tensors]
        together = torch.cat(words) if words else torch.empty(0, dtype=torch.int32, device=device)
        self._host = together.to("cpu", non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> Iterator[Tensor]:
        """The tensors, in order, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        words = torch.split(self._host, [shape.numel() for _, shape in self._forms])
        pairs = zip(words, self._forms, strict=True)
        return iter([one.view(dtype).view(shape) for one, (dtype, shape) in pairs])
