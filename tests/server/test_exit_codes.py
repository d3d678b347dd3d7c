"""A command's error becomes a message and an exit code, and the help lists every code."""

import re

import pytest

from server.exit_codes import EXIT_CODES, CommandError, ExitCode, exit_code_of


def test_the_exit_code_of_a_command_is_what_it_returns() -> None:
    assert exit_code_of(lambda: ExitCode.FAILED) == 1


def test_an_error_of_a_command_is_printed_and_sets_the_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing() -> int:
        raise CommandError("no such pair")

    assert exit_code_of(failing) == ExitCode.UNUSABLE
    assert capsys.readouterr().err == "mi-server: no such pair\n"


def test_a_command_that_is_interrupted_ends_with_130_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_code_of(interrupted) == ExitCode.INTERRUPTED == 130
    assert capsys.readouterr().err == "mi-server: interrupted\n"


def test_the_help_lists_every_exit_code() -> None:
    listed = {int(code) for code in re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE)}
    assert listed >= {code.value for code in ExitCode}
