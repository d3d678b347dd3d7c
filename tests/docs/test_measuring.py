"""`docs/measuring.md` names the commands, flags, graders and numbers of the code."""

import re
import shlex
from pathlib import Path

import pytest

from server.sweep.arguments import calibrate_parser, parse_arguments, sweep_parser
from server.sweep.estimates import RESAMPLES
from server.sweep.graders import GRADERS
from server.sweep.stages import THINKS_NEARLY_ALWAYS, THINKS_RARELY

PAGE = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text()
COMMANDS = re.findall(r"^mi-server (?:sweep|calibrate) .*$", PAGE, re.MULTILINE)
PARSERS = {"sweep": sweep_parser, "calibrate": calibrate_parser}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_accepted(command: str) -> None:
    _, name, *words = shlex.split(command)
    parse_arguments(PARSERS[name](), words)


def test_every_flag_is_mentioned() -> None:
    flags = {
        flag
        for parser in PARSERS.values()
        for action in parser()._actions
        for flag in action.option_strings
        if flag.startswith("--") and flag != "--help"
    }
    documented = {flag for flag in flags if re.search(rf"{flag}\b", PAGE)}
    assert flags - documented == set()


def test_every_grader_has_its_row() -> None:
    assert [name for name in GRADERS if name != "embedded" and f"| `{name}` |" not in PAGE] == []


def test_the_rules_state_the_numbers_of_the_code() -> None:
    assert f"below\n{THINKS_RARELY:g};" in PAGE
    assert f"at least {THINKS_NEARLY_ALWAYS:g};" in PAGE
    assert f"{RESAMPLES:,} resamples" in PAGE


def test_the_script_of_the_page_is_valid_python() -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    compile(script, "measuring.md", "exec")
