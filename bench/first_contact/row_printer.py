"""Prints the rows of a step of first contact; a measurement that fails becomes a row too."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from bench.gpu.cases import Skipped, message_of


class RowPrinter:
    """Prints the rows of one subject, and remembers whether any failed."""

    def __init__(self, subject: str, out: TextIO = sys.stdout) -> None:
        self._subject, self._out = subject, out
        self.failed = False

    def row(self, what: str, **values: Any) -> None:
        self.failed |= "error" in values
        row = {"subject": self._subject, "what": what, **values}
        print(json.dumps(row, default=str), file=self._out, flush=True)

    def attempt(self, what: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Prints a row with the values that `measure` returns, and the seconds that it took."""
        started = time.perf_counter()
        try:
            values = measure()
        except Skipped as reason:
            values = {"skipped": str(reason)}
        except Exception as error:  # whatever fails, the other rows are wanted
            values = {"error": message_of(error)}
        self.row(what, took=round(time.perf_counter() - started, 3), **values)
