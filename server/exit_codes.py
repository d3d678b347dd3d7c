"""The exit codes of `mi-server`, and how an error ends a command with one."""

import sys
from collections.abc import Callable
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What the shell sees. Each command's help names those it can end with."""

    DONE = 0
    FAILED = 1  # the engine process ended, or a measurement could not go on
    UNUSABLE = 2  # flags, settings, files or the pair cannot be used
    INTERRUPTED = 130  # by Ctrl-C, as shells have it


class CommandError(Exception):
    """Ends a command. The message is for the operator, and a subclass says the exit code."""

    exit_code: ClassVar[ExitCode] = ExitCode.UNUSABLE


def exit_code_of(command: Callable[[], int]) -> int:
    """Run a command; a `CommandError` is printed, and its exit code returned."""
    try:
        return command()
    except CommandError as error:
        print(f"mi-server: {error}", file=sys.stderr)
        return error.exit_code
