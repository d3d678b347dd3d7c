"""The process: uvicorn with a shutdown of our own, and the exit code.

uvicorn's answer to SIGTERM closes the listening socket at once. Here the socket stays: `/ready`
and new requests get a 503 while running answers finish, within `drain_timeout`, and only then
the server goes. An engine that ended stops the server as well, with a code that says so.
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

from mi_runtime.request import EngineInfo
from server.api.app import create_app
from server.exit_codes import ExitCode
from server.service import Service

logger = logging.getLogger(__name__)

FAREWELL_SECONDS: Final = 1.0
"""How long a server without its engine stays: streams end with their error, and probes of
`/health` see the 503."""


def run(service: Service) -> int:
    """Serve until a signal or the engine's end; returns the process's exit code."""
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
                timeout_graceful_shutdown=5,  # for what the drain time left over
            )
        )
        self._service = service
        self._drain_until = 0.0
        self._leave_at: float | None = None

    @property
    def exit_code(self) -> int:
        ended = self._service.engine.ended
        return ExitCode.DONE if ended is None else ended.exit_code

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announcement = asyncio.create_task(self._announce())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. A second one: go at once."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._drain_until = time.monotonic() + self._service.settings.drain_timeout
        logger.info("%s: draining", signal.Signals(sig).name)

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or self._is_over()
        return await super().on_tick(counter)

    def _is_over(self) -> bool:
        service, now = self._service, time.monotonic()
        if service.engine.ended is not None:
            if self._leave_at is None:
                logger.error("%s", service.engine.ended)
                was_serving = service.engine.info is not None
                self._leave_at = now + (FAREWELL_SECONDS if was_serving else 0)
            return now >= self._leave_at
        if not service.draining:
            return False
        if service.engine.open_requests and now < self._drain_until:
            return False
        service.engine.end_open_requests()
        return True

    async def _announce(self) -> None:
        """Once loaded, print what to try."""
        engine = self._service.engine
        await engine.settled.wait()
        if engine.info is None:
            return
        address, name, info = self._address(), self._service.settings.model_name, engine.info
        if self._service.settings.log_format == "json":
            logger.info("Ready", extra={"fields": {"address": address, "model": name}})
            return
        key = " -H 'Authorization: Bearer KEY'" if self._service.keys else ""
        print(
            f"Ready: {name} ({told(info)}profile {self._service.routing.name}) at {address}\n"
            f"Try:\n"
            f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '"
            f'{{"model": "{name}", "reasoning_lambda": 0.6, "messages": [{{"role": "user", '
            f'"content": "a=6,b=a-2,c=b+6,d=c-3. d?"}}]}}\'',
            flush=True,
        )

    def _address(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "http" if self._service.settings.ssl_certfile is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def told(info: EngineInfo) -> str:
    """The engine, as the operator is told of it: what it is and what it chose at start."""
    return (
        f"{info.model_type}, {_numbers(info)} on {info.device}, context {info.max_model_len}, "
        f"weights {_size(info.weight_bytes)}, {_size(info.peak_bytes)} at the peak of loading; "
        f"attention {info.attention}; {_products(info)}{_recorded(info)}"
    )


def _numbers(info: EngineInfo) -> str:
    """The number formats of the weights."""
    return (
        info.dtype if info.delta_dtype == "none" else f"{info.dtype} and {info.delta_dtype} delta"
    )


def _products(info: EngineInfo) -> str:
    """What was measured of pair products, where there was a choice."""
    return f"pair kernels {info.pair_kernels}; " if info.pair_kernels else ""


def _recorded(info: EngineInfo) -> str:
    return "" if info.graphs == "none" else f"decode steps: {info.graphs}; "


def _size(count: int) -> str:
    """Bytes, with three digits that count."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB" if value < 999.5 else f"{value:.0f} GB"
