"""The program `mi-server`: runs the command that its first argument names."""

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from server import __version__, serve
from server.engine.client import WORKER_COMMAND
from server.exit_codes import EXIT_CODES, exit_code_of
from server.merge import merge_command

COMMANDS: Final = {
    "serve": "serve a pair of checkpoints; the embedded pair if none is named",
    "merge": "write the weights at one λ as a checkpoint",
    "sweep": "ask many questions at every λ and report how λ changes the answers",
    "calibrate": "measure the profile from which `serve` picks λ",
}


def main(
    arguments: Sequence[str] | None = None, worker_command: Sequence[str] = WORKER_COMMAND
) -> int:
    """Runs `mi-server` with `arguments`, by default those of the process; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = _parser().parse_args(words[:1]).command  # the command parses the rest
    return exit_code_of(lambda: run(command, words[1:], worker_command))


def run(command: str, flags: Sequence[str], worker_command: Sequence[str]) -> int:
    """Runs one command and returns the exit code. Raises `CommandError`."""
    if command == "serve":
        return serve.main(flags, worker_command)
    if command == "merge":
        return merge_command.main(flags)
    from server.sweep import commands  # its libraries may not be installed

    return commands.sweep(flags) if command == "sweep" else commands.calibrate(flags)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mi-server",
        description="Serves an Instruct and a Thinking checkpoint at every λ between them.",
        epilog=f"`mi-server COMMAND --help` lists the flags of a command.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mi-server {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
