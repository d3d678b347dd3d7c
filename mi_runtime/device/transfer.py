"""What crosses between host and device in a step: small things, few copies, one wait.

What the host knows goes to the device through pinned memory, and nobody waits for it; what it wants
to know comes back in a single copy, and is waited for when it is read. Pinned memory is torch's:
its allocator hands a piece out again when the copies of it are done, so no step writes over what
an earlier one still reads. Knows nothing of what the numbers mean.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

ALIGNED: Final = 16  # bytes: where a tensor begins, as kernels are compiled for it
NUMPY: Final = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}
Array = np.ndarray[Any, np.dtype[Any]]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device as soon as what is computed there comes to it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of these numbers, or rows of numbers; sent in one copy.

    What is too large for fp32 is infinite there.
    """
    with np.errstate(over="ignore"):
        array = np.array(values, dtype=NUMPY[dtype])
    return send(torch.from_numpy(array), device)


def arrays_on_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The tensor of each array, all sent in one copy."""
    ends = np.cumsum([-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays]).tolist()
    packed = np.empty(ends[-1], dtype=np.uint8)
    places = [
        slice(first, first + array.nbytes) for first, array in zip((0, *ends), arrays, strict=False)
    ]
    for place, array in zip(places, arrays, strict=True):
        packed[place] = array.reshape(-1).view(np.uint8)
    sent = send(torch.from_numpy(packed), device)
    return [
        sent[place].view(torch.from_numpy(array).dtype).view(array.shape)
        for place, array in zip(places, arrays, strict=True)
    ]


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
