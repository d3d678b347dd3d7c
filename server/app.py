"""The ASGI app: routes, the one shape of errors, and the engine's life around them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from mi_runtime.request import EngineInfo
from server import __version__, chat
from server.config import Settings
from server.errors import ApiError, ModelNotFound, RequestFailed, error_body
from server.request_log import RequestLog
from server.service import Service

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

    app = FastAPI(title="mi-server", version=__version__, lifespan=lifespan, openapi_url=None)
    app.state.service = service
    _add_routes(app)
    _add_error_handlers(app)
    return RequestLog(app)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOfApp = Annotated[Service, Depends(_service)]


def _add_routes(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, service: ServiceOfApp) -> Response:
        return await chat.chat_completions(request, service)

    @app.get("/v1/models")
    async def models(service: ServiceOfApp) -> dict[str, Any]:
        base = service.settings.model_name
        names = [base, *(f"{base}@{value:g}" for value in LISTED_LAMBDAS)]
        return {"object": "list", "data": [_model(name, service) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, service: ServiceOfApp) -> dict[str, Any]:
        return _model(name, service)

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

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _model(name: str, service: Service) -> dict[str, Any]:
    """One model card; an alias names its parent and its λ. Raises `ModelNotFound`."""
    base = service.settings.model_name
    alias = service.dials.alias_lambda(name)
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
    routing = service.dials.route(model=name, body=None, header=None)
    return card | {"reasoning_lambda": routing.dials[0].reasoning_lambda}


def _pair(info: EngineInfo, settings: Settings) -> dict[str, Any]:
    """Which pair it is, by content and by the endpoints' names."""
    return {
        "identity": info.pair_identity,
        "instruct": Path(settings.instruct_endpoint).name,
        "thinking": Path(settings.thinking_endpoint).name,
        "layers": info.layers,
    }


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        body = error_body(str(error.detail), type="invalid_request_error", param=None, code=code)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def left_while_sending(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=chat.CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return _error_response(RequestFailed("The server failed to answer this request"))


def _error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)
