"""`docs/architecture.md`, `CONTRIBUTING.md` and `README.md` name files and packages that exist."""

import re
from pathlib import Path

import pytest

from tests.architecture.test_imports import ENGINE, SERVER

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
FOLDERS = "|".join(
    path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")
)
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """The first cells of a section's tables, without their headings."""
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    return [cell for cell in rows if "`" in cell or "*" in cell]


@pytest.mark.parametrize("page", PAGES)
def test_a_path_that_a_page_names_exists(page: str) -> None:
    paths = set(PATH.findall((ROOT / page).read_text()))
    assert not [path for path in paths if not (ROOT / path).exists()]
    if page != "README.md":
        assert len(paths) > 10


def test_every_package_has_its_line_in_the_order_of_imports() -> None:
    named = re.findall(r"`(\w+)`", " ".join(first_cells(section("Packages"))))
    pinned = [*SERVER, *ENGINE]
    assert named == [name for name in pinned if name != "__init__"]


def test_the_glossary_has_at_most_a_dozen_words() -> None:
    assert 0 < len(first_cells(section("Glossary"))) <= 12
