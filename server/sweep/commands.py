"""The commands `mi-server sweep` and `mi-server calibrate`, from arguments to exit code."""

import argparse
import asyncio
import shlex
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from server.exit_codes import ExitCode
from server.sweep.arguments import (
    calibrate_parser,
    parse_arguments,
    sweep_parser,
    without_api_keys,
)
from server.sweep.errors import BadParameters, Interrupted, SweepError, missing_library
from server.sweep.graders import Grader, grader_named
from server.sweep.tasks import EMBEDDED, Task, embedded_task, read_task

RESUMABLE: Final = "Finished samples are kept; the same command continues from them."


def sweep(arguments: Sequence[str]) -> int:
    """Runs `mi-server sweep`, and returns the exit code. Raises `SweepError`."""
    return _exit_code(lambda: _sweep(arguments))


def calibrate(arguments: Sequence[str]) -> int:
    """Runs `mi-server calibrate`, and returns the exit code. Raises `SweepError`."""
    return _exit_code(lambda: _calibrate(arguments))


def _exit_code(run: Callable[[], None]) -> int:
    """Runs a command, and adds to its error that the samples are kept."""
    try:
        run()
    except BadParameters:
        raise
    except (SweepError, OSError) as error:  # OSError: no permission, or a full disk
        raise SweepError(f"{error}\n{RESUMABLE}") from error
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. {RESUMABLE}") from None
    return ExitCode.DONE


def _sweep(arguments: Sequence[str]) -> None:
    flags = parse_arguments(sweep_parser(), arguments)
    task, grader = _task_and_grader(flags)
    from server.sweep.measurement import server_url
    from server.sweep.run_sweep import run_sweep

    with server_url(flags, flags.out) as url:
        asyncio.run(run_sweep(url, flags, task, grader))


def _calibrate(arguments: Sequence[str]) -> None:
    flags = parse_arguments(calibrate_parser(), arguments)
    task, grader = _task_and_grader(flags)
    from server.sweep.measurement import server_url
    from server.sweep.run_calibration import run_calibration, work_folder

    command = shlex.join(["mi-server", "calibrate", *without_api_keys(arguments)])
    threshold = f"--think-threshold={flags.think_threshold}"
    with server_url(flags, work_folder(flags.out), threshold) as url:
        asyncio.run(run_calibration(url, flags, task, grader, command))


def _task_and_grader(flags: argparse.Namespace) -> tuple[Task, Grader]:
    """Returns task and grader.

    Raises `BadParameters` for all that can be refused before a server starts.
    """
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
