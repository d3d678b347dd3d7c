"""`mi-server` lists its commands and exit codes, and refuses a line that names no command."""

import pytest

from server import cli
from server.exit_codes import ExitCode


def test_the_help_lists_every_command_and_every_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == ExitCode.DONE
    words = capsys.readouterr().out.split()
    assert set(cli.COMMANDS) <= set(words)
    assert {str(code.value) for code in ExitCode} <= set(words)


@pytest.mark.parametrize("arguments", [[], ["sevre"], ["--lambda", "0.5"]])
def test_a_command_line_without_a_command_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == ExitCode.UNUSABLE
    assert "usage: mi-server" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_prints_its_own_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == ExitCode.DONE
    assert f"usage: mi-server {command}" in capsys.readouterr().out
