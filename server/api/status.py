"""The routes for operators and load balancers: health, readiness, metrics, version, profile."""

from typing import Any

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST

from server import __version__
from server.api.dependencies import ServiceOfApp
from server.api.profile_response import profile_response


async def health(service: ServiceOfApp) -> dict[str, str]:
    """Answers while the server is alive. Raises `EngineDead` once the engine process has ended."""
    if service.engine.ended is not None and service.refusal is not None:
        raise service.refusal
    return {"status": "ok"}


async def ready(service: ServiceOfApp) -> dict[str, str]:
    """Answers while requests are accepted. Raises `Unavailable` while they are refused."""
    service.admit()
    return {"status": "ready"}


async def metrics(service: ServiceOfApp) -> Response:
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def profiles(service: ServiceOfApp) -> dict[str, Any]:
    service.admit()
    return profile_response(service.router)


async def version() -> dict[str, str]:
    return {"version": __version__}
