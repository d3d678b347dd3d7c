"""Kernels for CUDA, and whether they can run here.

The modules of this package import triton, which a CPU installation may lack: others import them
where they are used, once they know that `triton_installed()`. Each has a slow twin outside.
"""

import importlib.util
import os
import subprocess


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

    # Triton builds its launchers with the machine's C compiler, which may be missing or fail.
    return RuntimeError, TritonError, OSError, subprocess.SubprocessError
