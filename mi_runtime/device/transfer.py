"""Copies small tensors between host and device: few copies per step, and one wait.

Tensors go to the device through pinned memory, without waiting. Results come back in a single copy,
and the host waits only when it reads them. Torch's allocator reuses pinned memory only after its
copies are done, so a step never overwrites what an earlier one still reads.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

ALIGNED: Final = 16  # bytes: the alignment of tensors that kernels are compiled for
NUMPY: Final = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}
Array = np.ndarray[Any, np.dtype[Any]]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to the device, in order with the work there, without waiting."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of these numbers, or rows of numbers, sent in one copy.

    Numbers too large for fp32 become infinite.
    """
    with np.errstate(over="ignore"):
        array = np.array(values, dtype=NUMPY[dtype])
    return send(torch.from_numpy(array), device)


def columns_on_device(
    rows: Sequence[tuple[float, ...]], device: torch.device
) -> tuple[Tensor, ...]:
    """Sends rows of numbers in one copy, and returns each column as fp32 `[rows, 1]`."""
    return on_device(rows, torch.float32, device).unsqueeze(-1).unbind(1)


def to_index(column: Tensor) -> Tensor:
    """Converts a column `[rows, 1]` of integers, exact in fp32 below 2^24, to int64 `[rows]`."""
    return column.squeeze(1).long()


def arrays_on_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Returns the tensor of each array, all sent in one copy."""
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
    """A copy of int32 or fp32 tensors to the host, in progress.

    It starts when everything launched on the device before it is done.
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
        """Waits for the copy, and returns an iterator over the tensors in order."""
        if self._done is not None:
            self._done.synchronize()
        words = torch.split(self._host, [shape.numel() for _, shape in self._forms])
        pairs = zip(words, self._forms, strict=True)
        return iter([one.view(dtype).view(shape) for one, (dtype, shape) in pairs])
