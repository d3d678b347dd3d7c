"""What benches check of their command's arguments before they start any work."""

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path


def at_least(lowest: int) -> Callable[[str], int]:
    """The type of an argument."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, not {value}")
        return value

    return number


def numbers(text: str) -> list[int]:
    """The type of an argument: positive numbers with commas between."""
    return [at_least(1)(part) for part in text.split(",")]


def names(text: str, known: Collection[str]) -> list[str]:
    """Names with commas between."""
    found = [name.strip() for name in text.split(",")]
    if unknown := sorted(set(found) - set(known)):
        told = ", ".join(map(repr, unknown))
        raise argparse.ArgumentTypeError(f"there are {', '.join(known)}, not {told}")
    return found


def made_folder(parser: argparse.ArgumentParser, folder: Path) -> Path:
    """A folder to write to, made if it is not there; an error of the command where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"no folder to write to: {error}")
    if not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"no folder to write to: {folder} is write-protected")
    return folder
