"""`POST /tokenize` and `POST /detokenize`: they need the tokenizer alone, also while loading."""

import asyncio
from typing import Any

from starlette.requests import Request

from server import dial
from server.body import read_body
from server.errors import InvalidRequest
from server.prompt import Ending
from server.schemas import (
    TokenizeRequest,
    parse_detokenize_request,
    parse_tokenize_request,
)
from server.service import Service


async def tokenize(request: Request, service: Service) -> dict[str, Any]:
    """`max_model_len` is null while the engine loads."""
    wire = parse_tokenize_request(await read_body(request, service.settings.max_body_bytes))
    header = request.headers.get(dial.HEADER)
    ids = await asyncio.to_thread(_token_ids, wire, header, service)
    info, vocabulary = service.engine.info, service.prompts.vocabulary
    texts = [vocabulary.token_text(one) for one in ids] if wire.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": None if info is None else info.max_model_len,
        "tokens": ids,
        "token_strs": texts,
    }


def _token_ids(wire: TokenizeRequest, header: str | None, service: Service) -> list[int]:
    routing = service.dials.route(
        model=wire.model or service.settings.model_name, body=wire.reasoning_lambda, header=header
    )
    if wire.messages is None:
        assert wire.prompt is not None
        encoding = service.prompts.vocabulary.encoding(
            wire.prompt, add_special_tokens=wire.add_special_tokens
        )
        return list(encoding.ids)
    ending = Ending.of(
        continues=wire.continue_final_message, add_generation_prompt=wire.add_generation_prompt
    )
    return list(service.prompts.build(wire.messages, routing.dials[0], ending).token_ids)


async def detokenize(request: Request, service: Service) -> dict[str, str]:
    wire = parse_detokenize_request(await read_body(request, service.settings.max_body_bytes))
    if wire.model is not None:
        service.dials.alias_lambda(wire.model)  # raises for a model that is not served
    vocabulary = service.prompts.vocabulary
    for index, token_id in enumerate(wire.tokens):
        if vocabulary.tokenizer.id_to_token(token_id) is None:
            raise InvalidRequest(
                f"`tokens[{index}]` is not a token id of this model", param=f"tokens[{index}]"
            )
    return {"prompt": await asyncio.to_thread(vocabulary.decode, wire.tokens)}
