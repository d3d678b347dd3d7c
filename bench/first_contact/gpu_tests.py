"""The test steps of first contact: runs the tests that need a GPU, and prints a row for each.

    python -m bench.first_contact.gpu_tests kernels|engine [--smoke]

A kernel takes a second of one core to compile, so the tests run in several processes if
pytest-xdist is installed. Files and tests are ordered by importance. With `--smoke` they run on the
CPU at tiny shapes with Triton interpreted, and tests that need a GPU are skipped.
"""

import argparse
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Final

from bench.first_contact.row_printer import RowPrinter
from bench.gpu.cases import LONGEST_ERROR
from bench.measuring.folders import CHECKOUT

FILES: Final = {  # of tests/gpu; the steps that run the bench cover test_bench.py
    "kernels": ("test_pair_linear.py", "test_attention.py", "test_blend.py"),
    "engine": ("test_engine.py", "test_sampler.py"),
}
MOST_PROCESSES: Final = 4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=FILES)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    chosen = parser.parse_args(arguments)
    # The CPU references are small; threads of several processes would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if chosen.smoke:
        os.environ |= {"GPU_REHEARSAL": "1", "TRITON_INTERPRET": "1"}
    with os.fdopen(os.dup(1), "w") as out:  # only for rows, because pytest writes parts of lines
        os.dup2(2, 1)
        outcomes = Outcomes(RowPrinter(chosen.subject, out))
        return outcomes.run([str(CHECKOUT / "tests/gpu" / name) for name in FILES[chosen.subject]])


class Outcomes:
    """A pytest plugin that prints a row for each test when it ends."""

    def __init__(self, rows: RowPrinter) -> None:
        self._rows = rows
        self._passed = 0

    def run(self, files: Sequence[str]) -> int:
        """Runs the tests of `files` and returns an exit code.

        It is not 0 if no test passed, because without a GPU all of them are skipped.
        """
        import pytest

        flags = ["--rootdir", str(CHECKOUT), "-W", "default", "-p", "no:cacheprovider", *_spread()]
        try:
            code = int(pytest.main([*flags, *files], plugins=[self]))
        except BaseException:
            traceback.print_exc()
            return 1
        if not self._passed:
            self._rows.row("tests", error=f"none passed; pytest ended with code {code}")
        return code or int(not self._passed)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        self._passed += report.passed
        values = {"outcome": report.outcome, "took": round(report.duration, 2)}
        if report.failed:
            values["error"] = _last_line(report)
            # At once, so that a run that is killed reports it too.
            print(report.longreprtext, file=sys.__stderr__, flush=True)
        elif report.skipped:
            values["skipped"] = _last_line(report)
        self._rows.row(report.nodeid.rpartition("/")[2], **values)


def _spread() -> list[str]:
    if importlib.util.find_spec("xdist") is None:
        return []
    processes = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 4))
    return ["-n", str(processes), "--maxschedchunk", "1"]


def _last_line(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash is not None else str(report.longrepr)
    return str(message)[:LONGEST_ERROR]


if __name__ == "__main__":
    sys.exit(main())
