"""The pages name only files, modules, names, flags, targets, links and headings that exist."""

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from server.config import Settings

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "README.md")
    if path.name not in ("LOG.md", "CHANGELOG.md")  # these describe the past
)
FOLDERS = "|".join(path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file())
FOLDERS += "|docs"
IN_BACKTICKS = re.compile(r"`([^`\n]+)`")
A_PATH = re.compile(rf"(?:{FOLDERS})/[\w./-]*")
A_NAME = re.compile(r"_?[A-Z][a-z]+[A-Z]\w*|[A-Z]\w+\.\w+")  # CamelCase, or Class.attribute
OF_LIBRARIES = {"LayerNorm", "AutoTokenizer"}


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def sources() -> str:
    folders = ("server", "mi_runtime", "bench", "tests", "docs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@cache
def file_names() -> set[str]:
    folders = ("server", "mi_runtime", "bench", "tests", "docs")
    return {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}


def quoted(page: str) -> set[str]:
    """Returns what a page has in backticks, outside its code blocks."""
    return set(IN_BACKTICKS.findall(re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)))


def runs(module: str) -> bool:
    found = importlib.util.find_spec(module)
    is_package = found is not None and found.submodule_search_locations is not None
    return importlib.util.find_spec(f"{module}.__main__") is not None if is_package else bool(found)


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md", "bench/README.md"} < set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_file_that_a_page_names_exists(page: str) -> None:
    paths = {text for text in quoted(page) if A_PATH.fullmatch(text)}
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_a_module_that_a_page_names_by_its_file_alone_exists(page: str) -> None:
    names = {text for text in quoted(page) if re.fullmatch(r"\w+\.py", text)}
    assert names - file_names() <= {"utils.py"}  # which CONTRIBUTING.md forbids


@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_to_a_file_and_a_heading_that_exist(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_a_module_that_a_page_runs_exists(page: str) -> None:
    modules = set(re.findall(rf"python -m ((?:{FOLDERS})[\w.]*\w)", text_of(page)))
    assert not [name for name in modules if not runs(name)]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_a_name_of_the_code_that_a_page_names_is_in_the_code(page: str) -> None:
    names = {text for text in quoted(page) if A_NAME.fullmatch(text)} - OF_LIBRARIES
    assert names
    for name in names:
        assert all(re.search(rf"\b{part}\b", sources()) for part in name.split(".")), name


@pytest.mark.parametrize("page", PAGES)
def test_a_flag_that_a_page_names_is_a_flag_of_the_code(page: str) -> None:
    known = set(re.findall(r"\"(--[a-z][\w-]*)\"", sources()))
    for name in Settings.model_fields:
        known |= {f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"}
    named = {flag for text in quoted(page) for flag in re.findall(r"--[a-z][\w-]+", text)}
    assert not named - known - {"--batch_size", "--help"}  # of lm-eval, of argparse


@pytest.mark.parametrize("page", PAGES)
def test_a_make_target_that_a_page_names_exists(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text_of(page), re.MULTILINE))
    assert not named - targets
