"""Whether Triton kernels can run here, and what is raised where they cannot."""

import importlib.util
import os
import subprocess

import torch


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether kernels run on the CPU, slowly, as tests have them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch_errors() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not compile, or does not run on this device."""
    if not triton_installed():
        return (RuntimeError,)
    from triton.errors import TritonError

    # Triton builds its launchers with the machine's C compiler, which may be missing or fail; what
    # is built may not load; and a driver's library that the linker does not know is an assertion.
    of_launchers = OSError, subprocess.SubprocessError, ImportError, AssertionError
    return RuntimeError, ValueError, TritonError, *of_launchers


def is_lost(device: torch.device) -> bool:
    """Whether it takes no more work of this process, as after an access to memory not its own."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def cause_of(error: BaseException) -> str:
    """One line that says why, of an error that a kernel raised.

    Triton wraps what is wrong in a line of a kernel in errors that quote the lines around it, one
    for every function that the kernel calls.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    return (text.splitlines() or [""])[0][:100] or type(error).__name__
