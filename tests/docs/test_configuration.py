"""`docs/configuration.md` describes every setting as the code does."""

from pathlib import Path

from docs.tools import config_reference
from server.config import Settings

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_the_output_of_its_tool() -> None:
    assert PAGE.read_text() == config_reference.page()


def test_every_setting_has_its_row() -> None:
    for name, field in Settings.model_fields.items():
        (row,) = [
            line for line in PAGE.read_text().splitlines() if f"`MI_{name.upper()}` |" in line
        ]
        assert " ".join((field.description or "?").split()) in row


def test_bounds_of_optional_settings_are_shown() -> None:
    assert "| `MI_MAX_MODEL_LEN` | integer ≥ 2 |" in PAGE.read_text()
