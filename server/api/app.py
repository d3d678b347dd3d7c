"""The ASGI app: routes, the one shape of errors, and the engine's life around them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from mi_runtime.request import EngineInfo
from server import __version__
from server.access.gate import Gate
from server.api import chat, completions, tokenization
from server.api.playground import playground
from server.api.respond import CLIENT_CLOSED_REQUEST
from server.config import Settings
from server.ops import request_log
from server.ops.request_log import RequestLog
from server.routing import requested_lambda
from server.routing.profile_response import profile_response
from server.service import Service
from server.wire import openapi
from server.wire.error_response import error_response
from server.wire.errors import ApiError, ModelNotFound, RequestFailed, error_body

LISTED_LAMBDAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Aliases in the list of models, for clients that offer a choice of models only."""


def create_app(service: Service) -> ASGIApp:
    """The app of one server. Its lifespan ends the engine, which was started before."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.attach()
        try:
            yield
        finally:
            await service.engine.stop()
            if service.tracing is not None:
                await asyncio.to_thread(service.tracing.close)

    app = FastAPI(title="mi-server", version=__version__, lifespan=lifespan, openapi_url=None)
    app.state.service = service
    _add_routes(app)
    _add_error_handlers(app)
    return RequestLog(_guarded(app, service), service.tracing)


def _guarded(app: ASGIApp, service: Service) -> ASGIApp:
    """Behind the gate; browsers of known origins may read even what it refuses."""
    settings = service.settings
    gate = Gate(
        app,
        keys=service.keys,
        limits=service.rate_limits,
        request_timeout=settings.request_timeout,
        rejected=service.metrics.rejected,
    )
    if not settings.cors_origin:
        return gate
    return CORSMiddleware(
        gate,
        allow_origins=settings.cors_origin,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[request_log.HEADER, requested_lambda.HEADER, "Retry-After"],
    )


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOfApp = Annotated[Service, Depends(_service)]


def _add_routes(app: FastAPI) -> None:
    @app.get("/", response_model=None)
    async def page() -> Response:
        return playground()

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, service: ServiceOfApp) -> Response:
        return await chat.chat_completions(request, service)

    @app.post("/v1/completions", response_model=None)
    async def text_completions(request: Request, service: ServiceOfApp) -> Response:
        return await completions.completions(request, service)

    @app.post("/tokenize", response_model=None)
    async def tokenize(request: Request, service: ServiceOfApp) -> Response:
        return await tokenization.tokenize(request, service)

    @app.post("/detokenize", response_model=None)
    async def detokenize(request: Request, service: ServiceOfApp) -> Response:
        return await tokenization.detokenize(request, service)

    @app.get("/v1/models")
    async def models(service: ServiceOfApp) -> dict[str, Any]:
        base = service.settings.model_name
        names = [base, *(f"{base}@{value:g}" for value in LISTED_LAMBDAS)]
        return {"object": "list", "data": [_model(name, service) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, service: ServiceOfApp) -> dict[str, Any]:
        return _model(name, service)

    @app.get("/v1/profiles")
    async def profiles(service: ServiceOfApp) -> dict[str, Any]:
        service.admitted()
        return profile_response(service.routing)

    @app.get("/health")
    async def health(service: ServiceOfApp) -> dict[str, str]:
        if service.engine.ended is not None and service.refusal is not None:
            raise service.refusal
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(service: ServiceOfApp) -> dict[str, str]:
        service.admitted()
        return {"status": "ready"}

    @app.get("/metrics", response_model=None)
    async def metrics(service: ServiceOfApp) -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    description = openapi.document(__version__)

    @app.get("/openapi.json")
    async def openapi_document() -> dict[str, Any]:
        return description

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _model(name: str, service: Service) -> dict[str, Any]:
    """One model card; an alias names its parent and its λ. Raises `ModelNotFound`."""
    base = service.settings.model_name
    alias = service.lambda_reader.alias_lambda(name)
    info = service.engine.info
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "mi-server",
        "root": base,
        "parent": None if alias is None else base,
        "max_model_len": None if info is None else info.max_model_len,
        "pair": None if info is None else _pair(info, service.settings),
    }
    if alias is None:
        return card
    if not 0.0 <= alias <= 1.0:
        raise ModelNotFound(name, base)
    routing = service.lambda_reader.read(model=name, body=None, header=None)
    return card | {"reasoning_lambda": routing.dials[0].reasoning_lambda}


def _pair(info: EngineInfo, settings: Settings) -> dict[str, Any]:
    """Which pair it is, by content and by the endpoints' names."""
    return {
        "identity": info.pair_identity,
        "instruct": Path(settings.instruct_endpoint).name,
        "thinking": Path(settings.thinking_endpoint).name,
        "layers": info.layers,
        "delta_dtype": info.delta_dtype,
    }


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        request.state.trace.notes["error"] = error.code
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        body = error_body(str(error.detail), type="invalid_request_error", param=None, code=code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def left_while_sending(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return error_response(RequestFailed("The server failed to answer this request"))
