"""Waits for a device, so that a clock on the host measures its work."""

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
