"""The command `mi-server`.

    mi-server serve [flags]     serve a pair; without one named, the embedded pair
    mi-server merge --lambda 0.6 --out DIR
                                write one λ as a checkpoint of its own
    mi-server sweep [flags]     ask many questions at every λ and report what the dial does
    mi-server calibrate [flags] measure the profile that the router reads
    mi-server --version

Exit codes are those of `server.exit_codes`.
"""

import argparse
import sys
from collections.abc import Sequence

from server import __version__, merge, serve
from server.engine.client import WORKER_COMMAND
from server.exit_codes import exit_code_of


def main(
    arguments: Sequence[str] | None = None, worker_command: Sequence[str] = WORKER_COMMAND
) -> int:
    parser = argparse.ArgumentParser(
        prog="mi-server",
        description="Serve an Instruct and a Thinking checkpoint at every λ between them.",
        epilog="mi-server COMMAND --help tells the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"mi-server {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="serve a pair of checkpoints", add_help=False)
    commands.add_parser("merge", help="write one λ as a checkpoint of its own", add_help=False)
    commands.add_parser("sweep", help="measure what λ does, and report it", add_help=False)
    commands.add_parser("calibrate", help="measure a profile for the router", add_help=False)
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, flags = parser.parse_args(words[:1]).command, words[1:]
    return exit_code_of(lambda: run(command, flags, worker_command))


def run(command: str, flags: Sequence[str], worker_command: Sequence[str]) -> int:
    """Run one command; returns the exit code. Raises `CommandError`."""
    if command == "serve":
        return serve.main(flags, worker_command)
    if command == "merge":
        return merge.main(flags)
    from server.sweep import commands  # its libraries may not be installed

    return commands.sweep(flags) if command == "sweep" else commands.calibrate(flags)


if __name__ == "__main__":
    sys.exit(main())
