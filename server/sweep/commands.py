"""The commands `mi-server sweep` and `mi-server calibrate`, from arguments to exit code."""

import argparse
import asyncio
import shlex
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from server.exit_codes import ExitCode
from server.sweep.errors import BadParameters, Interrupted, SweepError, missing_library
from server.sweep.flags import calibrate_parser, parsed, sweep_parser, told
from server.sweep.graders import Grader, grader_named
from server.sweep.tasks import EMBEDDED, Task, embedded_task, read_task

KEPT: Final = "What is finished is kept; the same command goes on."


def sweep(arguments: Sequence[str]) -> int:
    """Run `mi-server sweep`. Raises `SweepError`."""
    return _ended(lambda: _sweep(arguments))


def calibrate(arguments: Sequence[str]) -> int:
    """Run `mi-server calibrate`. Raises `SweepError`."""
    return _ended(lambda: _calibrate(arguments))


def _ended(run: Callable[[], None]) -> int:
    """Run a command; an error that ends it says what is kept."""
    try:
        run()
    except BadParameters:
        raise
    except (SweepError, OSError) as error:  # OSError: the folder, or a full disk
        raise SweepError(f"{error}\n{KEPT}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. {KEPT}") from None
    return ExitCode.DONE


def _sweep(arguments: Sequence[str]) -> None:
    flags = parsed(sweep_parser(), arguments)
    task, grader = _prepared(flags)
    from server.sweep.run import run_sweep, server_url

    with server_url(flags, flags.out) as url:
        asyncio.run(run_sweep(url, flags, task, grader))


def _calibrate(arguments: Sequence[str]) -> None:
    flags = parsed(calibrate_parser(), arguments)
    task, grader = _prepared(flags)
    from server.sweep.run import run_calibration, server_url, work_folder

    command = shlex.join(["mi-server", "calibrate", *told(arguments)])
    threshold = f"--think-threshold={flags.think_threshold}"
    with server_url(flags, work_folder(flags.out), threshold) as url:
        asyncio.run(run_calibration(url, flags, task, grader, command))


def _prepared(flags: argparse.Namespace) -> tuple[Task, Grader]:
    """Everything that can be refused before a server is there."""
    for module in ("httpx", "matplotlib"):
        if find_spec(module) is None:
            raise missing_library(module, "measure")
    if flags.task == EMBEDDED:
        task = embedded_task(flags.questions, flags.seed)
    else:
        task = read_task(Path(flags.task), flags.questions)
    grader = grader_named(flags.grader, flags.pattern)
    for question in task.questions:
        grader.check(question)
    return task, grader
