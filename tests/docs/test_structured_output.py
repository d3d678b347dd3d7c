"""`docs/structured-output.md` states the limits of the code."""

from pathlib import Path

from server.text.grammar_builder import LARGEST_GRAMMAR, LARGEST_SCHEMA
from server.wire.tools import MOST_TOOLS

PAGE = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text()


def test_the_limits_are_those_of_the_code() -> None:
    assert f"at most {MOST_TOOLS} tools" in PAGE
    assert f"each schema can have at most {LARGEST_SCHEMA // 1024} KiB" in PAGE
    assert f"and all together {LARGEST_GRAMMAR // 1024} KiB" in PAGE
