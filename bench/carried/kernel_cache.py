"""Packs a cache of compiled kernels into a file, and unpacks it on another machine.

The cache contains the binaries, and the launchers that Triton has the C compiler build. Triton
finds them by a hash of the kernel's source and line, the types and divisibility of its arguments,
its options, and Triton's own files. If any of these differs, it finds nothing and compiles. Only
the absolute paths in an index bind a cache to its folder; unpacking rewrites them.
"""

import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar
from unittest.mock import patch

KEPT: Final = {".cubin", ".json", ".so"}  # nothing reads the other stages of a compilation again
INDEX: Final = "__grp__"  # files of a kernel, by Triton's name
Launcher = Callable[..., object]  # builds the launcher of a kernel, from its source and metadata
Compiled = TypeVar("Compiled")


def pack(file: Path, compile_all: Callable[[Launcher], Compiled]) -> Compiled:
    """Runs `compile_all` with a cache of its own, and packs the compiled kernels into `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.part")
    with (
        tarfile.open(unfinished, "w:xz") as archive,  # may fail, so before minutes of compiling
        tempfile.TemporaryDirectory() as directory,
    ):
        with (
            patch.dict(os.environ, TRITON_CACHE_DIR=directory),
            _building_launchers(Path(directory) / "stub") as launcher,
        ):
            compiled = compile_all(launcher)
        for path in sorted(Path(directory).glob("*/*")):
            if path.suffix in KEPT and not path.name.startswith(INDEX):
                archive.add(path, path.relative_to(directory))
    unfinished.replace(file)
    return compiled


def unpack(file: Path, into: Path) -> int:
    """Unpacks a cache and returns its number of kernels. Does not need Triton."""
    with tarfile.open(file) as archive:
        archive.extractall(into, filter="data")
    kernels = [path.absolute() for path in into.glob("*/*.json") if INDEX not in path.name]
    for kernel in kernels:
        files = {path.name: str(path) for path in kernel.parent.glob(f"{kernel.stem}.*")}
        (kernel.parent / f"{INDEX}{kernel.name}").write_text(json.dumps({"child_paths": files}))
    return len(kernels)


@contextmanager
def _building_launchers(stub: Path) -> Iterator[Launcher]:
    """Makes Triton build its launchers without a driver, and not load them.

    Their C code is linked with an empty library in place of the driver's.
    """
    from triton.backends.nvidia import driver
    from triton.runtime import build

    stub.mkdir()
    library = ["-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1"]
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *library, "-o", str(stub / "libcuda.so.1")], check=True)
    with (
        patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(stub)),
        patch.object(build, "_load_module_from_path", lambda name, path: _Unloaded()),
    ):
        driver.CudaUtils()
        # Later versions have one launcher for all, in what CudaUtils builds.
        yield driver.CudaLauncher if hasattr(driver, "make_launcher") else lambda *_: None


class _Unloaded:
    """Replaces a module whose functions are never called."""

    def __getattr__(self, name: str) -> None:
        return None
