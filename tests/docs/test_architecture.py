"""`docs/architecture.md` has the packages, and the functions on the path of a request."""

import re
from pathlib import Path

from tests.architecture.test_imports import ENGINE, SERVER

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """The first cells of a section's tables, without their headings."""
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    return [cell for cell in rows if "`" in cell or "*" in cell]


def test_every_package_has_its_line_in_the_order_of_imports() -> None:
    named = re.findall(r"`(\w+)`", " ".join(first_cells(section("Packages"))))
    pinned = [*SERVER, *ENGINE]
    assert named == [name for name in pinned if name != "__init__"]


def test_the_glossary_has_at_most_a_dozen_words() -> None:
    assert 0 < len(first_cells(section("Glossary"))) <= 12


def test_a_request_reaches_the_pipe_through_the_functions_that_the_page_lists() -> None:
    listed = re.findall(r"^\d\. `([\w.]+)` \(`([\w./]+)`\)", section("The path of a request"), re.M)
    assert len(listed) <= 8
    assert len({path for _, path in listed}) <= 6
    assert (listed[0][0], listed[-1][0]) == ("RequestLog.__call__", "EngineClient._write")
    for name, path in listed:
        *of_class, function = name.split(".")
        text = (ROOT / path).read_text()
        assert re.search(rf"^ *(?:async )?def {function}\(", text, re.M), name
        assert all(f"class {one}" in text for one in of_class), name
