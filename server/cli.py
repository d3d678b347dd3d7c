"""The command `mi-server`.

    mi-server serve [flags]     serve a pair; without one named, the embedded pair
    mi-server merge --lambda 0.6 --out DIR
                                write one λ as a checkpoint of its own
    mi-server sweep [flags]     ask many questions at every λ and report what the dial does
    mi-server calibrate [flags] measure the profile that the router reads
    mi-server --version

Exit codes: 0 after a drained shutdown, 1 where the engine died, 2 where settings or the pair
cannot be served.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from server import __version__, logs, merging
from server.callers import KeyFileError
from server.checkpoint import CheckpointError, Endpoint, local_directory
from server.config import ConfigError, Settings, load_settings
from server.engine_client import WORKER_COMMAND, EngineClient
from server.profiles import ProfileError

if TYPE_CHECKING:
    from server.tracing import Tracing

UNSERVABLE = 2


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
    if command in ("sweep", "calibrate"):
        return measure(command, flags)
    try:
        if command == "merge":
            merging.main(flags)
            return 0
        return serve(load_settings(flags), worker_command)
    except (ConfigError, CheckpointError, KeyFileError, ProfileError) as error:
        print(f"mi-server: {error}", file=sys.stderr)
        return UNSERVABLE


def measure(command: str, flags: Sequence[str]) -> int:
    """Run `sweep` or `calibrate`; returns the exit code."""
    from server.sweep import commands

    return commands.sweep(flags) if command == "sweep" else commands.calibrate(flags)


def serve(settings: Settings, worker_command: Sequence[str]) -> int:
    """Serve until the end; returns the exit code.

    Raises `ConfigError`, `CheckpointError`, `KeyFileError` and `ProfileError`.
    """
    logs.configure(settings.log_level, settings.log_format)
    settings.check_certificate()
    tracing = _tracing(settings)
    instruct = local_directory(settings.instruct_endpoint)
    thinking = local_directory(settings.thinking_endpoint)
    engine = EngineClient(
        settings.engine_config(instruct=instruct, thinking=thinking),
        max_waiting=settings.max_waiting,
        max_waiting_tokens=settings.max_waiting_tokens,
        timeout=settings.engine_timeout,
        command=worker_command,
    )
    engine.start()  # it loads while this process still imports and reads
    try:
        from server.service import Service
        from server.serving import run

        endpoints = Endpoint.read(instruct), Endpoint.read(thinking)
        service = Service(settings, *endpoints, engine, tracing)
    except BaseException:
        engine.discard()
        raise
    return run(service)


def _tracing(settings: Settings) -> "Tracing | None":
    if settings.otlp_traces_endpoint is None:
        return None
    try:
        from server.tracing import Tracing
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs OpenTelemetry: pip install 'mi-server[otel]' ({error})"
        ) from error
    return Tracing(settings.otlp_traces_endpoint)


if __name__ == "__main__":
    sys.exit(main())
