"""`POST /v1/chat/completions`: answers a conversation."""

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from mi_runtime.request import EngineInfo
from server.answer.chat_format import CHAT
from server.api.admission import admission
from server.api.body import parse_without_blocking, read_body
from server.api.dependencies import ServiceOfApp
from server.api.prepared_request import (
    PreparedChoice,
    PreparedRequest,
    add_log_fields,
    route,
    seeded_choices,
)
from server.api.respond import respond
from server.api.submission import submit
from server.routing.requested_lambda import LAMBDA_HEADER
from server.routing.routing_decision import RoutingDecision
from server.service import Service
from server.text.prompt import Ending, Prompt
from server.wire.chat_request import ChatRequest, parse_chat_request
from server.wire.errors import InvalidRequest


async def chat_completions(request: Request, service: ServiceOfApp) -> Response:
    async with admission(request, service) as info:
        prepared = await prepare_chat(request, service, info)
        answer = submit(prepared, service)
    return await respond(request, prepared, answer, service)


async def prepare_chat(request: Request, service: Service, info: EngineInfo) -> PreparedRequest:
    """Reads and checks a chat request. Raises `ApiError` for anything that is refused."""
    body = await read_body(request, service.settings.max_body_bytes)
    wire = await parse_without_blocking(body, parse_chat_request)
    decision = route(wire, request.headers.get(LAMBDA_HEADER), service, info)
    # In a thread: a long prompt takes as long to encode as a hundred tokens take to send.
    grammar, prompts = await asyncio.to_thread(_grammar_and_prompts, wire, decision, service)
    add_log_fields(request.state.notes, wire, decision)
    return PreparedRequest(
        wire=wire,
        decision=decision,
        choices=_choices(wire, decision, prompts, service, info),
        info=info,
        notes=request.state.notes,
        caller=request.state.caller,
        deadline=request.state.deadline,
        answer_format=CHAT,
        include_reasoning=wire.shows_reasoning,
        tools=bool(wire.offered_tools),
        grammar=grammar,
    )


def _grammar_and_prompts(
    wire: ChatRequest, decision: RoutingDecision, service: Service
) -> tuple[str | None, list[Prompt]]:
    """Returns the grammar of the answer, if it has one, and the prompt of each dial."""
    grammar = service.grammar_builder.grammar(wire)
    ending = Ending.of(
        continues=wire.continue_final_message, add_generation_prompt=wire.add_generation_prompt
    )
    prompts = service.prompt_builder.build_each(
        wire.messages, decision.dials, ending, wire.offered_tools
    )
    has_tags = service.prompt_builder.vocabulary.has_think_tags
    if grammar is not None and not has_tags and any(prompt.opens_block for prompt in prompts):
        # The engine cannot see where the block ends, where the grammar would begin.
        param = "tools" if wire.offered_tools else "response_format"
        raise InvalidRequest(
            f"`{param}` needs think tags that are single tokens, which this model lacks",
            param=param,
        )
    return grammar, prompts


def _choices(
    wire: ChatRequest,
    decision: RoutingDecision,
    prompts: Sequence[Prompt],
    service: Service,
    info: EngineInfo,
) -> list[PreparedChoice]:
    """Returns one choice for each λ of a fan-out, or else `n` choices."""
    of_dials = [
        PreparedChoice(
            dial,
            prompt,
            service.sampling_policy.resolve(wire, prompt_tokens=len(prompt.token_ids), info=info),
        )
        for dial, prompt in zip(decision.dials, prompts, strict=True)
    ]
    return of_dials if decision.fan_out else seeded_choices(of_dials[0], wire.choices)
