"""Runs `mi-server merge`.

All files are written to a temporary directory next to `--out`, which is renamed at the end: a run
that ends early leaves no `--out`.
"""

import argparse
import glob
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from server.config import ConfigError
from server.exit_codes import ExitCode
from server.merge.merge_plan import METHODS, plan_merge
from server.merge.merged_checkpoint import write_checkpoint


def main(arguments: Sequence[str]) -> int:
    """Runs `mi-server merge` and returns the exit code. Raises `CommandError`."""
    plan = plan_merge(_parser().parse_args(arguments))
    out = plan.arguments.out
    if out.exists():
        raise ConfigError(f"{out}: exists already; nothing was written")
    prefix = f".{out.name}.partial-"
    for leftover in out.parent.glob(f"{glob.escape(prefix)}*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as directory:
            partial = Path(directory) / out.name
            partial.mkdir()
            write_checkpoint(plan, partial)
            partial.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}") from error
    print(f"Merged into {out}")
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mi-server merge",
        description="Writes one λ, or a baseline merge, as a checkpoint.",
    )
    add = parser.add_argument
    add(
        "--instruct",
        default=str(INSTRUCT_DIRECTORY),
        help="Instruct endpoint: a directory or hub id (default: that of the embedded pair)",
    )
    add(
        "--thinking",
        default=str(THINKING_DIRECTORY),
        help="Thinking endpoint: a directory or hub id (default: that of the embedded pair)",
    )
    add("--lambda", dest="reasoning_lambda", help="a number, or a JSON object of λ by blend group")
    add("--out", type=Path, required=True, help="directory to write; it must not exist")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number format of the files (default: that of the endpoints)",
    )
    add(
        "--think-threshold",
        type=float,
        default=0.0,
        help="highest λ that gets Instruct's chat template (default: 0)",
    )
    add(
        "--method",
        choices=METHODS,
        default="interpolation",
        help="how to merge (default: interpolation)",
    )
    add("--base", help="model that both endpoints were tuned from; for task-arithmetic and ties")
    add("--scale", type=float, help="factor of the task vectors (default: 0.7; for ties 0.5)")
    add(
        "--density",
        type=float,
        default=0.2,
        help="share of each task vector that ties keeps (default: 0.2)",
    )
    return parser
