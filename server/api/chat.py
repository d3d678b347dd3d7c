"""`POST /v1/chat/completions`: messages, understood."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from server.api.body import parsed, read_body
from server.api.prepared import Asked, AskedChoice, copies, note, route
from server.api.respond import respond
from server.ops.request_log import Trace
from server.routing import requested_lambda
from server.routing.routing_decision import RoutingDecision
from server.service import Service
from server.text.prompt import Ending, Prompt
from server.wire.chat_request import ChatRequest, parse_chat_request
from server.wire.errors import InvalidRequest


async def chat_completions(request: Request, service: Service) -> Response:
    return await respond(request, service, _understand)


async def _understand(request: Request, service: Service, trace: Trace) -> Asked:
    """Everything that can be refused is refused here."""
    body = await read_body(request, service.settings.max_body_bytes)
    wire = await parsed(body, parse_chat_request)
    engine = service.admitted()
    routing = route(wire, request.headers.get(requested_lambda.HEADER), service, engine)
    ending = Ending.of(
        continues=wire.continue_final_message, add_generation_prompt=wire.add_generation_prompt
    )
    # In a thread: a long prompt takes as long to encode as a hundred tokens take to send.
    grammar, prompts = await asyncio.to_thread(_prepare, wire, routing, ending, service)
    engine = service.admitted()
    note(trace, wire, routing)
    starts = [
        AskedChoice(
            setting,
            prompt,
            service.sampling.resolve(wire, prompt_tokens=len(prompt.token_ids), engine=engine),
        )
        for setting, prompt in zip(routing.dials, prompts, strict=True)
    ]
    choices = starts if routing.fan_out else copies(starts[0], wire.choices)
    return Asked(
        wire,
        routing,
        choices,
        engine,
        trace,
        request.state.caller,
        include_reasoning=wire.shows_reasoning,
        tools=bool(wire.offered_tools),
        grammar=grammar,
    )


def _prepare(
    wire: ChatRequest, routing: RoutingDecision, ending: Ending, service: Service
) -> tuple[str | None, list[Prompt]]:
    """What the answer obeys, and the prompt at each dial."""
    grammar = service.grammar_builder.grammar(wire)
    prompts = service.prompts.build_each(wire.messages, routing.dials, ending, wire.offered_tools)
    has_tags = service.prompts.vocabulary.has_think_tags
    if grammar is not None and not has_tags and any(prompt.opens_block for prompt in prompts):
        # The engine cannot see the block end, and so not where the answer begins.
        param = "tools" if wire.offered_tools else "response_format"
        raise InvalidRequest(
            f"`{param}` needs think tags that are single tokens, which this model lacks",
            param=param,
        )
    return grammar, prompts
