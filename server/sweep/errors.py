"""What ends a measurement. Finished samples are kept whatever ended it."""


class SweepError(Exception):
    """The measurement cannot go on. The message is for the one who started it."""


class BadParameters(SweepError):
    """The command's parameters, task file or output folder cannot be used."""


def missing_library(library: str, extra: str) -> BadParameters:
    return BadParameters(f"this needs `{library}`: pip install 'mi-server[{extra}]'")
