"""Unpacks the wheels of packages that this machine lacks into a folder. It installs nothing.

The steps of first contact have that folder on their path. Uses only the standard library.
"""

import importlib.metadata
import re
import zipfile
from pathlib import Path
from typing import Final

from bench.measuring.folders import CHECKOUT

WHEELS: Final = CHECKOUT / ".wheels"
KERNELS: Final = WHEELS / "kernels.tar.xz"


def unpack_missing(wheels: Path, site: Path) -> list[str]:
    """Unpacks the wheels of missing distributions into `site`, and returns their names."""
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
    """Returns the version of every distribution on the path, by normalized name."""
    return {
        normalized(found.metadata["Name"]): found.version
        for found in importlib.metadata.distributions()
    }


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
