"""Types of the benchmarks' arguments, so that wrong ones are refused before any work."""

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path


def at_least(lowest: int) -> Callable[[str], int]:
    """Returns an argument type: it parses an integer that is at least `lowest`."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, not {value}")
        return value

    return number


def numbers(text: str) -> list[int]:
    """Parses positive integers separated by commas."""
    return [at_least(1)(part) for part in text.split(",")]


def names(text: str, known: Collection[str]) -> list[str]:
    """Parses names separated by commas. Raises ArgumentTypeError for one that is not `known`."""
    found = [name.strip() for name in text.split(",")]
    if unknown := sorted(set(found) - set(known)):
        listed = ", ".join(map(repr, unknown))
        raise argparse.ArgumentTypeError(f"unknown: {listed}; choose from {', '.join(known)}")
    return found


def made_folder(parser: argparse.ArgumentParser, folder: Path) -> Path:
    """Creates the output folder if needed, and ends the command with an error if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"no folder to write to: {error}")
    if not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"no folder to write to: {folder} is write-protected")
    return folder
