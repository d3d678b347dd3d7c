"""`POST /tokenize` and `POST /detokenize`, which work while the engine is still loading.

The exception is tokenizing messages: which λ takes which chat template depends on the profile, and
the profile depends on the loaded pair.

A body of a few megabytes makes an answer of millions of numbers, so everything about it, including
its JSON, is computed in a thread and does not block the event loop.
"""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.body import read_body
from server.api.dependencies import ServiceOfApp
from server.routing.requested_lambda import LAMBDA_HEADER
from server.service import Service
from server.text.prompt import Ending
from server.wire.errors import InvalidRequest
from server.wire.tokenize_request import (
    TokenizeRequest,
    parse_detokenize_request,
    parse_tokenize_request,
)


async def tokenize(request: Request, service: ServiceOfApp) -> Response:
    """Answers with the token ids of a text or of messages.

    `max_model_len` in the answer is null while the engine loads.
    """
    body = await read_body(request, service.settings.max_body_bytes)
    return await asyncio.to_thread(_tokens, body, request.headers.get(LAMBDA_HEADER), service)


def _tokens(body: bytes, header: str | None, service: Service) -> Response:
    wire = parse_tokenize_request(body)
    ids = _token_ids(wire, header, service)
    info, vocabulary = service.engine.info, service.prompt_builder.vocabulary
    texts = [vocabulary.token_text(one) for one in ids] if wire.return_token_strs else None
    answer = {
        "count": len(ids),
        "max_model_len": None if info is None else info.max_model_len,
        "tokens": ids,
        "token_strs": texts,
    }
    return JSONResponse(answer)


def _token_ids(wire: TokenizeRequest, header: str | None, service: Service) -> list[int]:
    requested = service.lambda_reader.read(
        model=wire.model or service.settings.model_name, body=wire.reasoning_lambda, header=header
    )
    if wire.messages is None:
        assert wire.prompt is not None
        return service.prompt_builder.vocabulary.encode(
            wire.prompt, add_special_tokens=wire.add_special_tokens
        )
    if service.engine.info is None and service.refusal is not None:
        raise service.refusal
    ending = Ending.of(
        continues=wire.continue_final_message, add_generation_prompt=wire.add_generation_prompt
    )
    return list(service.prompt_builder.build(wire.messages, requested.dials[0], ending).token_ids)


async def detokenize(request: Request, service: ServiceOfApp) -> Response:
    body = await read_body(request, service.settings.max_body_bytes)
    return await asyncio.to_thread(_text, body, service)


def _text(body: bytes, service: Service) -> Response:
    wire = parse_detokenize_request(body)
    if wire.model is not None:
        service.lambda_reader.alias_lambda(wire.model)  # raises `ModelNotFound`
    vocabulary = service.prompt_builder.vocabulary
    for index, token_id in enumerate(wire.tokens):
        if vocabulary.tokenizer.id_to_token(token_id) is None:
            raise InvalidRequest(
                f"`tokens[{index}]` is not a token id of this model", param=f"tokens[{index}]"
            )
    return JSONResponse({"prompt": vocabulary.decode(wire.tokens)})
