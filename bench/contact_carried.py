"""What is carried to a GPU machine without network: packages it lacks, and compiled kernels.

Wheels of distributions that are missing here are unpacked into a folder that steps have on their
path; nothing is installed. Plain standard library.
"""

import importlib.metadata
import re
import zipfile
from pathlib import Path
from typing import Final

WHEELS: Final = Path(__file__).parents[1] / ".wheels"
KERNELS: Final = WHEELS / "kernels.tar.xz"


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
