"""`POST /v1/completions`: raw prompts, as text or as token ids, several of them in one request.

A raw prompt has no chat template and no think block: λ applies to it as to any other, a cap on
reasoning and another λ for the answer do not.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from mi_runtime.request import Dial, EngineInfo
from server.answer.echo import Echo
from server.answer.text_format import TEXT
from server.api.body import parsed, read_body
from server.api.prepared import Asked, AskedChoice, copies, note, refuse_think_fields, route
from server.api.respond import respond
from server.ops.request_log import Trace
from server.routing import requested_lambda
from server.service import Service
from server.text.prompt import Prompt
from server.text.vocabulary import Vocabulary
from server.wire.completion_request import CompletionRequest, parse_completion_request
from server.wire.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class _RawPrompt:
    token_ids: tuple[int, ...]
    echo: Echo | None


async def completions(request: Request, service: Service) -> Response:
    return await respond(request, service, _understand)


async def _understand(request: Request, service: Service, trace: Trace) -> Asked:
    """Everything that can be refused is refused here."""
    body = await read_body(request, service.settings.max_body_bytes)
    wire = await parsed(body, parse_completion_request)
    engine = service.admitted()
    refuse_think_fields(wire, "needs a think block, which a raw prompt does not have")
    routing = route(wire, request.headers.get(requested_lambda.HEADER), service, engine)
    vocabulary = service.prompts.vocabulary
    prompts = await asyncio.to_thread(_raw_prompts, wire, vocabulary, engine.vocab_size)
    engine = service.admitted()
    note(trace, wire, routing)
    choices = [
        choice
        for prompt in prompts
        for choice in _choices(prompt, wire, routing.dials, service, engine)
    ]
    return Asked(
        wire,
        routing,
        choices,
        engine,
        trace,
        request.state.caller,
        form=TEXT,
        prompts=len(prompts),
    )


def _choices(
    prompt: _RawPrompt,
    wire: CompletionRequest,
    dials: Sequence[Dial],
    service: Service,
    engine: EngineInfo,
) -> list[AskedChoice]:
    """Of one prompt: one for each λ of a fan-out, else `n`."""
    sampling = service.sampling.resolve(wire, prompt_tokens=len(prompt.token_ids), engine=engine)
    raw = Prompt(prompt.token_ids, opens_block=False, is_raw=True)
    start = AskedChoice(dials[0], raw, sampling, prompt.echo)
    if isinstance(wire.reasoning_lambda, list):
        return [replace(start, dial=one) for one in dials]
    return copies(start, wire.choices)


def _raw_prompts(
    wire: CompletionRequest, vocabulary: Vocabulary, vocab_size: int
) -> list[_RawPrompt]:
    """Raises `InvalidRequest` for a prompt without tokens, or with ids that do not exist."""
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
    if not wire.echo:  # offsets cost as much again
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
