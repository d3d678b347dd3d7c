"""`mi-server serve`: starts the engine process, then the HTTP server in this one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.config import ConfigError, Settings, load_settings
from server.engine.client import WORKER_COMMAND, EngineClient
from server.ops import logs
from server.text.checkpoint import EndpointText, local_directory

if TYPE_CHECKING:
    from server.ops.tracing import Tracing


def main(flags: Sequence[str], worker_command: Sequence[str] = WORKER_COMMAND) -> int:
    """Serves until a signal or the engine's end, and returns the exit code.

    Raises `CommandError` for settings, files or a pair that cannot be used.
    """
    settings = load_settings(flags)
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
    engine.start()  # it loads the pair while this process imports modules and reads files
    try:
        from server.api.uvicorn_server import run
        from server.service import Service

        endpoints = EndpointText.read(instruct), EndpointText.read(thinking)
        service = Service(settings, *endpoints, engine, tracing)
    except BaseException:
        engine.discard()
        raise
    return run(service)


def _tracing(settings: Settings) -> "Tracing | None":
    if settings.otlp_traces_endpoint is None:
        return None
    try:
        from server.ops.tracing import Tracing
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs OpenTelemetry: pip install 'mi-server[otel]' ({error})"
        ) from error
    return Tracing(settings.otlp_traces_endpoint)
