"""Downloads the wheels that the server needs and a GPU machine without network lacks.

    python -m bench.gpu_wheels              downloads 7.4 MB into .wheels, for CPython 3.12
    python -m bench.gpu_wheels --machine    prints the needed packages that the GPU machine has

`bench/gpu_machine.txt` lists the packages of the GPU machine: replace it by that machine's `pip
freeze`. pip resolves everything that the project depends on, constrained to the versions known to
be on the machine; only missing packages are downloaded. Run it where there is a network, with the
same Python version (3.12) on the same system, because pip resolves for the Python it runs on.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from bench.carried.missing_packages import WHEELS, normalized
from bench.measuring.folders import CHECKOUT

MACHINE: Final = Path(__file__).with_name("gpu_machine.txt")
PYTHON: Final = "3.12"
PLATFORMS: Final = (  # named after the glibc that a wheel needs; pip matches each exactly
    *(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)),
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
    "linux_x86_64",
)
TESTS: Final = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "httpx")
"""Packages that first contact needs in addition to the server; a GPU machine must have them."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--machine", action="store_true", help="print the list, and download nothing"
    )
    chosen = parser.parse_args(arguments)
    if f"{sys.version_info.major}.{sys.version_info.minor}" != PYTHON:
        parser.error(f"needs Python {PYTHON}: pip resolves for the Python that runs it")
    present = machine_packages(MACHINE.read_text())
    try:
        needed = resolved(present)
        if chosen.machine:
            print(*(f"{name}=={version}" for name, version in needed.items() if name in present))
        else:
            missing = {name: needed[name] for name in needed if name not in present}
            download(missing, WHEELS)
    except subprocess.CalledProcessError as error:  # pip has printed why
        return error.returncode
    return 0


def machine_packages(text: str) -> dict[str, str | None]:
    """Returns the machine's packages by normalized name.

    The value is the version, or None if no package index has it.
    """
    named = re.finditer(r"^(\w[\w.-]*)(?:==([\w.]+))?", text, re.MULTILINE)
    return {normalized(found[1]): found[2] for found in named}


def requirements() -> Iterator[str]:
    """Yields what the server requires, from `pyproject.toml`, and what first contact's tests do."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    yield from (*project["dependencies"], *TESTS)


def resolved(present: dict[str, str | None]) -> dict[str, str]:
    """Returns the version of every package that the GPU machine needs, including those it has."""
    with tempfile.TemporaryDirectory() as folder:
        report, pins = Path(folder, "report.json"), Path(folder, "pins.txt")
        known = (f"{name}=={version}\n" for name, version in present.items() if version)
        pins.write_text("".join(known))
        _pip("install", "--dry-run", "--ignore-installed", "--quiet", "--target", folder,
             "--report", str(report), "--constraint", str(pins), *requirements())  # fmt: skip
        installs = json.loads(report.read_text())["install"]
    found = {normalized(one["metadata"]["name"]): one["metadata"]["version"] for one in installs}
    return dict(sorted(found.items()))


def download(wanted: dict[str, str], folder: Path) -> None:
    """Replaces the wheels in `folder` by these. Changes nothing if one cannot be downloaded."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        pins = [f"{name}=={version}" for name, version in wanted.items()]
        _pip("download", "--quiet", "--no-deps", "--dest", fresh, *pins)
        for old in folder.glob("*.whl"):
            old.unlink()
        wheels = [wheel.rename(folder / wheel.name) for wheel in Path(fresh).glob("*.whl")]
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.1f} MB, in {folder}")


def _pip(command: str, *arguments: str) -> None:
    there = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    there += [flag for platform in PLATFORMS for flag in ("--platform", platform)]
    subprocess.run([sys.executable, "-m", "pip", command, *there, *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
