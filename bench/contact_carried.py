"""What is carried to a GPU machine without network: packages that it lacks, and compiled kernels.

`.wheels/` has wheels (`make gpu-wheels`). Those of distributions that are missing here are unpacked
into a folder that steps have on their path; nothing is installed. `.kernels/` may have a Triton
cache (`python -m bench.kernel_code --cache .kernels`), whose files name each other by absolute
paths: it is copied, and they are told where they lie now. Plain standard library.
"""

import importlib.metadata
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path


def unpack_missing(wheels: Path, site: Path) -> list[str]:
    """Names of the wheels that were unpacked into `site`."""
    unpacked = []
    for wheel in sorted(wheels.glob("*.whl")):
        if not is_installed(wheel.name.split("-")[0]):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            unpacked.append(wheel.name)
    return unpacked


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def installed() -> dict[str, str]:
    """Normalized names of all distributions on the path, with their versions."""
    return {
        normalized(found.metadata["Name"]): found.version
        for found in importlib.metadata.distributions()
    }


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def copy_kernels(carried: Path, cache: Path) -> int:
    """The number of kernels in the copy."""
    shutil.copytree(carried, cache, dirs_exist_ok=True)
    groups = list(cache.rglob("__grp__*"))
    for group in groups:
        told = json.loads(group.read_text())
        told["child_paths"] = dict(_moved(told["child_paths"], group.parent))
        group.write_text(json.dumps(told))
    return len(groups)


def _moved(paths: dict[str, str], folder: Path) -> Iterator[tuple[str, str]]:
    for name, path in paths.items():
        yield name, str(folder / Path(path).name)
