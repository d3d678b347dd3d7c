"""The errors that end a measurement. Finished samples are kept in every case."""

from server.exit_codes import CommandError, ExitCode


class SweepError(CommandError):
    """The measurement cannot continue."""

    exit_code = ExitCode.FAILED


class Interrupted(SweepError):
    """The user stopped the measurement."""

    exit_code = ExitCode.INTERRUPTED


class BadParameters(SweepError):
    """The command's parameters, task file or output folder cannot be used."""

    exit_code = ExitCode.UNUSABLE


def missing_library(library: str, extra: str) -> BadParameters:
    return BadParameters(f"this requires `{library}`: pip install 'mi-server[{extra}]'")
