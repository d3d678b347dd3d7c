"""`POST /v1/completions`: answers raw prompts, as text or token ids, several in one request.

A raw prompt has no chat template and no think block. λ applies to it as to any other prompt; a cap
on reasoning and a separate λ for the answer are refused.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from starlette.requests import Request
from starlette.responses import Response

from mi_runtime.request import EngineInfo
from server.answer.completions_format import COMPLETIONS
from server.answer.echo import Echo
from server.api.admission import admission
from server.api.body import parse_without_blocking, read_body
from server.api.dependencies import ServiceOfApp
from server.api.prepared_request import (
    PreparedChoice,
    PreparedRequest,
    add_log_fields,
    refuse_think_fields,
    route,
    seeded_choices,
)
from server.api.respond import respond
from server.api.submission import submit
from server.routing.requested_lambda import LAMBDA_HEADER
from server.routing.routing_decision import RoutingDecision
from server.service import Service
from server.text.prompt import Prompt
from server.text.vocabulary import Vocabulary
from server.wire.completion_request import CompletionRequest, parse_completion_request
from server.wire.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class _RawPrompt:
    token_ids: tuple[int, ...]
    echo: Echo | None


async def text_completions(request: Request, service: ServiceOfApp) -> Response:
    async with admission(request, service) as info:
        prepared = await prepare_completion(request, service, info)
        answer = submit(prepared, service)
    return await respond(request, prepared, answer, service)


async def prepare_completion(
    request: Request, service: Service, info: EngineInfo
) -> PreparedRequest:
    """Reads and checks a completion request. Raises `ApiError` for anything that is refused."""
    body = await read_body(request, service.settings.max_body_bytes)
    wire = await parse_without_blocking(body, parse_completion_request)
    refuse_think_fields(wire, "needs a think block, which a raw prompt does not have")
    decision = route(wire, request.headers.get(LAMBDA_HEADER), service, info)
    vocabulary = service.prompt_builder.vocabulary
    prompts = await asyncio.to_thread(_raw_prompts, wire, vocabulary, info.vocab_size)
    add_log_fields(request.state.notes, wire, decision)
    choices = [_choices(prompt, wire, decision, service, info) for prompt in prompts]
    return PreparedRequest(
        wire=wire,
        decision=decision,
        choices=list(chain.from_iterable(choices)),
        info=info,
        notes=request.state.notes,
        caller=request.state.caller,
        deadline=request.state.deadline,
        answer_format=COMPLETIONS,
        prompt_count=len(prompts),
    )


def _choices(
    prompt: _RawPrompt,
    wire: CompletionRequest,
    decision: RoutingDecision,
    service: Service,
    info: EngineInfo,
) -> list[PreparedChoice]:
    """Returns the choices of one prompt: one for each λ of a fan-out, or else `n`."""
    sampling = service.sampling_policy.resolve(wire, prompt_tokens=len(prompt.token_ids), info=info)
    raw = Prompt(prompt.token_ids, opens_block=False, is_raw=True)
    first = PreparedChoice(decision.dials[0], raw, sampling, prompt.echo)
    if decision.fan_out:
        return [replace(first, dial=one) for one in decision.dials]
    return seeded_choices(first, wire.choices)


def _raw_prompts(
    wire: CompletionRequest, vocabulary: Vocabulary, vocab_size: int
) -> list[_RawPrompt]:
    """Returns the tokens of each prompt.

    Raises `InvalidRequest` for a prompt without tokens, or with ids that do not exist.
    """
    several = isinstance(wire.prompt, list) and len(wire.prompts) > 1
    built = []
    for index, prompt in enumerate(wire.prompts):
        param = f"prompt[{index}]" if several else "prompt"
        raw = (
            _of_text(prompt, wire, vocabulary)
            if isinstance(prompt, str)
            else _of_tokens(prompt, wire, vocabulary, vocab_size, param)
        )
        if not raw.token_ids:
            raise InvalidRequest(f"`{param}` has no tokens", param=param)
        built.append(raw)
    return built


def _of_text(text: str, wire: CompletionRequest, vocabulary: Vocabulary) -> _RawPrompt:
    if not wire.echo:  # offsets would double the cost
        ids = vocabulary.encode(text, add_special_tokens=wire.add_special_tokens)
        return _RawPrompt(tuple(ids), echo=None)
    encoding = vocabulary.encoding(text, add_special_tokens=wire.add_special_tokens)
    starts = [start for start, _ in encoding.offsets]
    return _RawPrompt(tuple(encoding.ids), Echo(text, encoding.ids, starts))


def _of_tokens(
    token_ids: Sequence[int],
    wire: CompletionRequest,
    vocabulary: Vocabulary,
    vocab_size: int,
    param: str,
) -> _RawPrompt:
    if max(token_ids) >= vocab_size:
        raise InvalidRequest(
            f"`{param}` has {max(token_ids)}, which is not a token id; they go up to "
            f"{vocab_size - 1}",
            param=param,
        )
    echo = Echo.of_tokens(token_ids, vocabulary) if wire.echo else None
    return _RawPrompt(tuple(token_ids), echo)
