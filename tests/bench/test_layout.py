"""The commands of `bench/`: each is found by its name, and described in `bench/README.md`."""

import importlib.util
import re
from pathlib import Path

from bench.first_contact.steps import STEPS

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
README = (BENCH / "README.md").read_text(encoding="utf-8")


def test_every_module_directly_in_bench_is_a_command() -> None:
    modules = {path.stem for path in BENCH.glob("*.py")} - {"__init__"}
    assert {name for name in modules if "__main__" in (BENCH / f"{name}.py").read_text()} == modules


def test_the_readme_describes_every_command() -> None:
    commands = {path.stem for path in BENCH.glob("*.py")} - {"__init__"}
    commands |= {path.parent.name for path in BENCH.glob("*/__main__.py")}
    made = {"gpu_wheels"}  # run by make
    assert commands - made <= set(re.findall(r"python -m bench\.(\w+)", README))


def test_the_readme_lists_the_steps_of_first_contact_with_their_modules_and_limits() -> None:
    rows = re.findall(r"^\| ([a-z]) (\w+) \| `([\w.]+).*?` \| (\d+) \|", README, re.MULTILINE)
    assert rows == [(step.letter, step.name, step.command[0], str(step.limit)) for step in STEPS]


def test_every_step_of_first_contact_runs_a_module_that_exists() -> None:
    assert all(importlib.util.find_spec(step.command[0]) for step in STEPS)
