"""Says whether Triton kernels can run here, and which exceptions they raise if they cannot."""

import importlib.util
import os
import subprocess

import torch


def triton_installed() -> bool:
    """Whether the triton package is installed."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, as in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions of kernels that do not compile or do not run on this device."""
    if not triton_installed():
        return (RuntimeError,)
    from triton.errors import TritonError

    # Triton builds its launchers with a C compiler, which may be missing or fail; the result may
    # not load; and Triton asserts that the linker knows the driver's library.
    of_launchers = OSError, subprocess.SubprocessError, ImportError, AssertionError
    return RuntimeError, ValueError, TritonError, *of_launchers


def is_lost(device: torch.device) -> bool:
    """Whether this process can no longer use the device, as after an illegal memory access."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def cause_of(error: BaseException) -> str:
    """Returns the cause of a kernel's error in one line.

    Triton wraps an error in a kernel's code once for every function on the way, each time quoting
    the code around it.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    return (text.splitlines() or [""])[0][:100] or type(error).__name__
