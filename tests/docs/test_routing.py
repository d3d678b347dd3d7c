"""`docs/routing.md` states the constants of the code, and shows the built-in profiles."""

import hashlib
import re
from pathlib import Path

import pytest

from server.config import Settings
from server.routing.profiles import BUILTIN
from server.routing.reasoning_options import EFFORT_SHARES
from server.routing.routing_policy import BUDGET, EFFORT, ENABLE_THINKING, REBUILD_SECONDS
from server.routing.routing_table import P90_PER_MEAN

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "routing.md").read_text()


@pytest.mark.parametrize("path", sorted(BUILTIN.glob("*.json")), ids=lambda path: path.stem)
def test_every_built_in_profile_has_a_picture_of_its_current_content(path: Path) -> None:
    picture = (DOCS / "curves" / f"{path.stem}.svg").read_text()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert f">{digest}<" in picture, "draw it again: python -m bench.curves"
    assert f"(curves/{path.stem}.svg)" in PAGE


def test_every_picture_shows_a_built_in_profile() -> None:
    pictures = {path.stem for path in (DOCS / "curves").glob("*.svg")}
    assert pictures == {path.stem for path in BUILTIN.glob("*.json")}


def test_the_table_of_efforts_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert {name: float(share) for name, share in rows} == EFFORT_SHARES


def test_constants_and_sources_are_stated() -> None:
    assert f"{P90_PER_MEAN} times the mean" in PAGE
    assert f"every {REBUILD_SECONDS:g} seconds" in PAGE
    for source in (BUDGET, EFFORT, ENABLE_THINKING, "body", "model", "header", "default"):
        assert f"`{source}`" in PAGE


def test_every_setting_of_routing_is_mentioned() -> None:
    names = [it for it in Settings.model_fields if it.startswith(("adapt", "elastic", "profile"))]
    assert len(names) == 9
    for name in [*names, "default_lambda", "think_threshold"]:
        assert f"`--{name.replace('_', '-')}" in PAGE
