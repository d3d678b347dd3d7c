"""Runs uvicorn with a graceful shutdown, and determines the exit code of the process.

On SIGTERM uvicorn closes the listening socket at once. Here the socket stays open: `/ready` and new
requests get a 503 while running answers finish, for at most `drain_timeout`, and only then the
server stops. The end of the engine process stops the server as well, with its own exit code.
"""

import asyncio
import logging
import signal
import socket
import ssl
import time
from types import FrameType
from typing import Final

import uvicorn

from server.api.app import create_app
from server.api.ready_message import ready_message
from server.exit_codes import ExitCode
from server.service import Service

logger = logging.getLogger(__name__)

EXIT_DELAY_SECONDS: Final = 1.0
"""Time between the end of the engine and that of the server: streams end with their error, and
probes of `/health` see the 503."""


def run(service: Service) -> int:
    """Serves until a signal or the end of the engine. Returns the exit code of the process."""
    server = _Server(service)
    server.run()
    return server.exit_code


class _Server(uvicorn.Server):
    def __init__(self, service: Service) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=settings.host,
                port=settings.port,
                root_path=settings.root_path,
                proxy_headers=settings.forwarded_allow_ips is not None,
                forwarded_allow_ips=settings.forwarded_allow_ips,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_keyfile_password=settings.key_password,
                ssl_ca_certs=None if settings.ssl_ca_certs is None else str(settings.ssl_ca_certs),
                ssl_cert_reqs=ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,  # after the drain
            )
        )
        self._service = service
        self._drain_until = 0.0
        self._leave_at: float | None = None
        self._announcement: asyncio.Task[None]  # from `startup` on

    @property
    def exit_code(self) -> int:
        ended = self._service.engine.ended
        return ExitCode.DONE if ended is None else ended.exit_code

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announcement = asyncio.create_task(self._announce())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains after the first signal, and stops at once after a second one."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._drain_until = time.monotonic() + self._service.settings.drain_timeout
        logger.info("Received %s, draining", signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or self._is_over()
        return await super().on_tick(counter)

    def _is_over(self) -> bool:
        service, now = self._service, time.monotonic()
        if service.engine.ended is not None:
            if self._leave_at is None:
                logger.error("%s", service.engine.ended)
                was_serving = service.engine.info is not None
                self._leave_at = now + (EXIT_DELAY_SECONDS if was_serving else 0)
            return now >= self._leave_at
        if not service.draining:
            return False
        if service.engine.open_requests and now < self._drain_until:
            return False
        service.engine.end_open_requests()
        return True

    async def _announce(self) -> None:
        """Reports that the engine is loaded."""
        engine = self._service.engine
        await engine.settled.wait()
        if engine.info is None:
            return
        address, service = self._address(), self._service
        model = service.settings.model_name
        if service.settings.log_format == "json":
            logger.info("Ready", extra={"fields": {"address": address, "model": model}})
            return
        message = ready_message(
            model=model,
            profile=service.router.name,
            address=address,
            info=engine.info,
            needs_key=bool(service.keys),
        )
        print(message, flush=True)

    def _address(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "http" if self._service.settings.ssl_certfile is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
