"""The exit codes of `mi-server`, and the errors that end a command with one of them."""

import sys
from collections.abc import Callable
from enum import IntEnum
from typing import ClassVar, Final


class ExitCode(IntEnum):
    """How a command ended; `EXIT_CODES` explains the numbers."""

    DONE = 0
    FAILED = 1
    UNUSABLE = 2
    INTERRUPTED = 130  # 128 + SIGINT, as shells report it


EXIT_CODES: Final = """exit codes:
  0    success; also a server stopped by a signal
  1    the engine process ended, or a measurement could not continue
  2    flags, settings, files or the pair cannot be used
  3    the server cannot listen at its address and port
  130  interrupted by Ctrl-C; `serve` only before it listens"""
"""The meaning of every code, for help texts."""


class CommandError(Exception):
    """Ends a command. The message is for the operator; a subclass may set another exit code."""

    exit_code: ClassVar[ExitCode] = ExitCode.UNUSABLE


def exit_code_of(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code.

    Prints the message of a `CommandError`, and that Ctrl-C interrupted the command, to standard
    error.
    """
    try:
        return command()
    except CommandError as error:
        print(f"mi-server: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("mi-server: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
