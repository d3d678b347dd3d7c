"""The first step of first contact: reports what the machine has, and if a kernel runs.

    python -m bench.first_contact.environment [--smoke]

It changes no setting: `nvidia-smi` is only queried.
"""

import argparse
import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench.carried.missing_packages import KERNELS, installed
from bench.first_contact.row_printer import RowPrinter
from bench.gpu.cases import Skipped
from bench.measuring.folders import CHECKOUT

PACKAGES: Final = ("mi_runtime", "server", "bench")
OPTIONAL: Final = {"triton", "opentelemetry", "math_verify", "if_verifiable", "matplotlib"}
"""Optional packages that a module may need: those for measuring, and for kernels on a CPU."""
REPORTED: Final = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "numpy",
    "tokenizers",
    "fastapi",
)
QUERIED: Final = (
    "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,"
    "power.limit,persistence_mode,mig.mode.current,compute_mode"
)
Facts = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="without a GPU")
    smoke = parser.parse_args(arguments).smoke
    rows = RowPrinter("environment")
    rows.attempt("packages", package_facts)
    rows.attempt("nvidia-smi", nvidia_facts)
    rows.attempt("room", room_facts)
    rows.attempt("C compiler", compiler_facts)
    rows.attempt("torch", torch_facts)
    rows.attempt("device", lambda: device_facts(smoke))
    rows.attempt("carried kernels", lambda: carried_facts(smoke))
    rows.attempt("a Triton kernel", kernel_facts)
    rows.attempt("imports", import_facts)
    return int(rows.failed)


def package_facts() -> Facts:
    found = installed()
    named = ", ".join(f"{name} {found.get(name)}" for name in REPORTED)
    return {
        "figure": f"Python {platform.python_version()}, {named}",
        "python": sys.version,
        "executable": sys.executable,
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "packages": found,
    }


def nvidia_facts() -> Facts:
    if shutil.which("nvidia-smi") is None:
        raise Skipped("there is no nvidia-smi")
    query = ["nvidia-smi", f"--query-gpu={QUERIED}", "--format=csv,noheader"]
    output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    values = output.splitlines()[0].split(", ")
    return {"figure": values[0], **dict(zip(QUERIED.split(","), values, strict=True))}


def room_facts() -> Facts:
    """Returns the free bytes on disk and in memory."""
    folders = [path for path in (".", "/tmp", "/dev/shm") if Path(path).is_dir()]
    free = {path: shutil.disk_usage(path).free for path in folders}
    return {**free, "memory": os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}


def compiler_facts() -> Facts:
    """Reports the C compiler and Python's headers: Triton builds its launchers with them."""
    found = (os.environ.get("CC"), *map(shutil.which, ("cc", "gcc", "clang")))
    compiler = next(filter(None, found), None)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not compiler or not headers.exists():
        raise FileNotFoundError(f"compiler: {compiler}, {headers}: {headers.exists()}")
    return {"compiler": compiler, "ncu": shutil.which("ncu")}


def torch_facts() -> Facts:
    started = time.perf_counter()
    import torch

    return {
        "figure": f"import torch {time.perf_counter() - started:.1f} s",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "threads": torch.get_num_threads(),
    }


def device_facts(smoke: bool) -> Facts:
    import torch

    if not torch.cuda.is_available():
        if smoke:
            raise Skipped("rehearsed without a GPU")
        raise RuntimeError("torch sees no CUDA device")
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    square = torch.randn(256, 256, device="cuda").bfloat16()
    assert bool((square @ square).isfinite().all())
    return {
        "figure": f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free",
        "name": found.name,
        "capability": [found.major, found.minor],
        "processors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "free": free,
        "total": total,
    }


def carried_facts(smoke: bool) -> Facts:
    """Copies kernels that were compiled elsewhere to where Triton looks for its own."""
    if smoke or not KERNELS.exists():
        raise Skipped("kernels are interpreted" if smoke else f"there is no {KERNELS}")
    from triton import knobs

    from bench.carried.kernel_cache import unpack

    return {"figure": f"{unpack(KERNELS, Path(knobs.cache.dir))} kernels carried"}


def kernel_facts() -> Facts:
    import torch

    from bench.first_contact.smallest_kernel import doubled

    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = torch.randn(1000, device=device)
    assert torch.equal(doubled(numbers), 2 * numbers)
    return {"device": device}


def import_facts() -> Facts:
    """Imports every module of the engine, the server and the benchmarks.

    A module that lacks an optional package is reported. Any other failure is an error.
    """
    lacking, failed, count = {}, [], 0
    for name in modules():
        count += 1
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if str(error.name).split(".")[0] in OPTIONAL:
                lacking[name] = error.name
            else:
                failed.append(f"{name}: {error}")
        except Exception as error:  # the other modules are tried all the same
            failed.append(f"{name}: {type(error).__name__}: {error}")
    imported = count - len(failed) - len(lacking)
    optional = f", {len(lacking)} lack an optional package" if lacking else ""
    facts = {"figure": f"{imported} of {count} modules import{optional}", "lacking": lacking}
    return facts | ({"error": "; ".join(failed)} if failed else {})


def modules() -> Iterator[str]:
    for package in PACKAGES:
        for path in sorted((CHECKOUT / package).rglob("*.py")):
            parts = path.relative_to(CHECKOUT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    sys.exit(main())
