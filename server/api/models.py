"""`GET /v1/models`: the model cards of the served pair and of its listed aliases."""

from pathlib import Path
from typing import Any, Final

from mi_runtime.request import EngineInfo
from server.api.dependencies import ServiceOfApp
from server.config import Settings
from server.service import Service
from server.wire.errors import ModelNotFound

LISTED_LAMBDAS: Final = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Aliases in the list of models, for clients that can only choose a model."""


async def list_models(service: ServiceOfApp) -> dict[str, Any]:
    base = service.settings.model_name
    names = [base, *(f"{base}@{value:g}" for value in LISTED_LAMBDAS)]
    return {"object": "list", "data": [_model_card(name, service) for name in names]}


async def show_model(name: str, service: ServiceOfApp) -> dict[str, Any]:
    return _model_card(name, service)


def _model_card(name: str, service: Service) -> dict[str, Any]:
    """Returns the card of the model or of an alias, with the alias's λ. Raises `ModelNotFound`."""
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
    requested = service.lambda_reader.read(model=name, body=None, header=None)
    return card | {"reasoning_lambda": requested.dials[0].reasoning_lambda}


def _pair(info: EngineInfo, settings: Settings) -> dict[str, Any]:
    """Identifies the pair by its content and by the names of its endpoints."""
    return {
        "identity": info.pair_identity,
        "instruct": Path(settings.instruct_endpoint).name,
        "thinking": Path(settings.thinking_endpoint).name,
        "layers": info.layers,
        "delta_dtype": info.delta_dtype,
    }
