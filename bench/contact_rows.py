"""Rows of a step of first contact, as it prints them; what fails is a row that says so."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TextIO

LONGEST_ERROR: Final = 500  # characters


class Skipped(Exception):
    """What this machine or this run cannot have; the message says why."""


class Told:
    """Prints the rows of one subject, and remembers whether any failed."""

    def __init__(self, subject: str, out: TextIO = sys.stdout) -> None:
        self._subject, self._out = subject, out
        self.failed = False

    def row(self, what: str, **values: Any) -> None:
        self.failed |= "error" in values
        print(json.dumps({"subject": self._subject, "what": what, **values}, default=str),
              file=self._out, flush=True)  # fmt: skip

    def attempt(self, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """The values that `measure` gives, and the seconds that it took."""
        started = time.perf_counter()
        try:
            values = measure()
        except Skipped as reason:
            values = {"skipped": str(reason)}
        except Exception as error:  # whatever it is, the other rows are wanted
            values = {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}
        self.row(what, took=round(time.perf_counter() - started, 3), **values)
