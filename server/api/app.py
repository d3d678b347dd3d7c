"""The ASGI app: middleware, routes, the JSON shape of errors, and the engine's lifespan."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from server import __version__
from server.access.middleware import AccessMiddleware
from server.api.chat import chat_completions
from server.api.completions import text_completions
from server.api.models import list_models, show_model
from server.api.playground import playground
from server.api.respond import CLIENT_CLOSED_REQUEST
from server.api.status import health, metrics, profiles, ready, version
from server.api.tokenization import detokenize, tokenize
from server.ops.request_log import REQUEST_ID_HEADER, RequestLog
from server.routing.requested_lambda import LAMBDA_HEADER
from server.service import Service
from server.wire import openapi
from server.wire.error_response import error_response
from server.wire.errors import ApiError, RequestFailed, error_body


def create_app(service: Service) -> ASGIApp:
    """Returns the app of one server. Its lifespan attaches the started engine, and stops it."""

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
    return RequestLog(_with_access_control(app, service), service.tracing)


def _with_access_control(app: ASGIApp, service: Service) -> ASGIApp:
    """Adds keys and quotas, and CORS around them, so that browsers can read refusals too."""
    settings = service.settings
    checked = AccessMiddleware(
        app,
        keys=service.keys,
        limits=service.rate_limits,
        request_timeout=settings.request_timeout,
        count_refusal=service.metrics.rejected,
    )
    if not settings.cors_origin:
        return checked
    return CORSMiddleware(
        checked,
        allow_origins=settings.cors_origin,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER, LAMBDA_HEADER, "Retry-After"],
    )


def _add_routes(app: FastAPI) -> None:
    app.post("/v1/chat/completions", response_model=None)(chat_completions)
    app.post("/v1/completions", response_model=None)(text_completions)
    app.post("/tokenize", response_model=None)(tokenize)
    app.post("/detokenize", response_model=None)(detokenize)
    app.get("/v1/models")(list_models)
    app.get("/v1/models/{name:path}")(show_model)
    app.get("/v1/profiles")(profiles)
    app.get("/health")(health)
    app.get("/ready")(ready)
    app.get("/metrics", response_model=None)(metrics)
    app.get("/version")(version)
    app.get("/", response_model=None)(playground)
    description = openapi.document(__version__)

    @app.get("/openapi.json")
    async def openapi_document() -> dict[str, Any]:
        return description


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        request.state.notes.fields["error"] = error.code
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
