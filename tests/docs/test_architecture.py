"""`docs/architecture.md` lists the packages in the order of their imports, and a short glossary."""

import re
from pathlib import Path

from tests.architecture.test_imports import ENGINE, SERVER

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """Returns the first cells of a section's tables, without their headings."""
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    return [cell for cell in rows if "`" in cell or "*" in cell]


def test_every_package_has_its_line_in_the_order_of_imports() -> None:
    named = re.findall(r"`(\w+)`", " ".join(first_cells(section("Packages"))))
    pinned = [*SERVER, *ENGINE]
    assert named == [name for name in pinned if name != "__init__"]


def test_the_glossary_has_at_most_a_dozen_words() -> None:
    assert 0 < len(first_cells(section("Glossary"))) <= 12
