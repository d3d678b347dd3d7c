"""`POST /v1/chat/completions`: from a wire request to an answer, every refusal before the 200."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mi_runtime.request import Dial, EngineInfo, EngineRequest, SamplingParams
from server import dial
from server.answer import Answer, AnswerHead
from server.choice import Choice
from server.dial import Routing
from server.errors import BodyTooLarge, InvalidRequest, Unavailable
from server.generation import ClientLeft
from server.prompt import Prompt
from server.rendering import completion, sse
from server.request_log import Trace
from server.sampling import seed_of_choice
from server.schemas import ChatRequest, parse_chat_request
from server.service import Service
from server.watching import EventStream, watched

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it stands in the log


@dataclass(frozen=True, slots=True)
class _AskedChoice:
    """What one choice starts from."""

    dial: Dial
    prompt: Prompt
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class _Asked:
    """A chat request, understood."""

    wire: ChatRequest
    routing: Routing
    choices: Sequence[_AskedChoice]
    engine: EngineInfo
    trace: Trace
    grammar: str | None  # that every choice's answer obeys

    @property
    def tools(self) -> bool:
        """Whether the model may call any."""
        return bool(self.wire.offered_tools)


async def chat_completions(request: Request, service: Service) -> Response:
    try:
        asked = await _understand(request, service, request.state.trace)
        answer = _submit(asked, service)
    except Unavailable as error:
        service.metrics.rejected(error.code)
        raise
    headers = {dial.HEADER: asked.routing.header}
    if asked.wire.stream:
        events = sse(answer, keep_alive=service.settings.keep_alive)
        return EventStream(events, answer.generation, headers)
    try:
        async with watched(answer.generation, request.receive):
            return JSONResponse(await completion(answer), headers=headers)
    except ClientLeft:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body, which is refused as soon as it is too long."""
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"The body is longer than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


async def _understand(request: Request, service: Service, trace: Trace) -> _Asked:
    """Everything that can be refused is refused here."""
    service.admitted()  # before the body is read
    wire = parse_chat_request(await read_body(request, service.settings.max_body_bytes))
    engine = service.admitted()
    routing = _route(wire, request.headers.get(dial.HEADER), service, engine)
    # In a thread: a long prompt takes as long to encode as a hundred tokens take to send.
    grammar, prompts = await asyncio.to_thread(_prepare, wire, routing, service)
    engine = service.admitted()
    _note(trace, wire, routing)
    starts = [
        _AskedChoice(
            setting,
            prompt,
            service.sampling.resolve(wire, prompt_tokens=len(prompt.token_ids), engine=engine),
        )
        for setting, prompt in zip(routing.dials, prompts, strict=True)
    ]
    choices = starts if routing.fan_out else _copies(starts[0], wire.choices)
    return _Asked(wire, routing, choices, engine, trace, grammar)


def _route(wire: ChatRequest, header: str | None, service: Service, engine: EngineInfo) -> Routing:
    routing = service.dials.route(
        model=wire.model, body=wire.reasoning_lambda, header=header, layers=engine.layers
    )
    if not service.prompts.vocabulary.has_think_tags:
        _refuse_think_fields(wire)
    routing = service.dials.with_answer(routing, wire.answer_lambda)
    return replace(routing, cap=wire.reasoning_cap)


def _refuse_think_fields(wire: ChatRequest) -> None:
    """Without tags that are tokens the engine follows no think block."""
    fields = {"answer_lambda": wire.answer_lambda, **wire.budgets}
    for param, value in fields.items():
        if value is not None and value >= 0:
            raise InvalidRequest(
                f"`{param}` needs think tags that are single tokens, which this model lacks",
                param=param,
            )


def _prepare(
    wire: ChatRequest, routing: Routing, service: Service
) -> tuple[str | None, list[Prompt]]:
    """What the answer obeys, and the prompt at each dial."""
    grammar = service.constraint.grammar(wire)
    prompts = service.prompts.build_each(wire.messages, routing.dials, wire.offered_tools)
    has_tags = service.prompts.vocabulary.has_think_tags
    if grammar is not None and not has_tags and any(prompt.opens_block for prompt in prompts):
        # The engine cannot see the block end, and so not where the answer begins.
        param = "tools" if wire.offered_tools else "response_format"
        raise InvalidRequest(
            f"`{param}` needs think tags that are single tokens, which this model lacks",
            param=param,
        )
    return grammar, prompts


def _copies(start: _AskedChoice, count: int) -> list[_AskedChoice]:
    """The `n` choices at one λ, which differ in what they draw."""
    sampling = start.sampling
    return [
        replace(start, sampling=replace(sampling, seed=seed_of_choice(sampling.seed, index)))
        for index in range(count)
    ]


def _note(trace: Trace, wire: ChatRequest, routing: Routing) -> None:
    trace.notes |= {
        "lambda": routing.header,
        "source": routing.source,
        "stream": int(wire.stream),
        **({} if routing.answer is None else {"answer_lambda": wire.answer_lambda}),
        **({} if routing.cap is None else {"cap": routing.cap}),
        **({"user": wire.user} if wire.user else {}),
        **({"metadata": wire.metadata} if wire.metadata else {}),
    }


def _submit(asked: _Asked, service: Service) -> Answer:
    """Hand the choices to the engine, each as a request of its own."""
    requests = _engine_requests(asked, service)
    generation = service.engine.submit(requests)
    choices = {
        request.request_id: _choice(index, asked, service) for index, request in enumerate(requests)
    }
    return Answer(_head(asked), choices, generation, notes=asked.trace.notes)


def _engine_requests(asked: _Asked, service: Service) -> list[EngineRequest]:
    number = service.next_request_number()
    routing = asked.routing
    return [
        EngineRequest(
            request_id=f"{number}-{index}",
            prompt=choice.prompt.token_ids,
            dial=choice.dial,
            sampling=choice.sampling,
            think=service.think_blocks.policy(
                opened_by_prompt=choice.prompt.opens_block,
                cap=routing.cap,
                tools=asked.tools,
                constrained=asked.grammar is not None,
            ),
            cache_salt=asked.wire.cache_salt,
            answer_dial=None if routing.answer == choice.dial else routing.answer,
            grammar=asked.grammar,
        )
        for index, choice in enumerate(asked.choices)
    ]


def _choice(index: int, asked: _Asked, service: Service) -> Choice:
    start = asked.choices[index]
    return Choice(
        index,
        vocabulary=service.prompts.vocabulary,
        splitter=service.think_blocks.splitter(
            opened_by_prompt=start.prompt.opens_block, tools=asked.tools
        ),
        stop=asked.wire.stop_strings,
        meter=service.metrics.meter(
            start.dial.reasoning_lambda, len(start.prompt.token_ids), asked.trace.arrived
        ),
        logprobs=asked.wire.logprobs,
        tools=asked.tools,
    )


def _head(asked: _Asked) -> AnswerHead:
    trace = asked.trace
    return AnswerHead(
        id=trace.request_id if trace.given else f"chatcmpl-{trace.request_id}",
        created=int(time.time()),
        model=asked.wire.model,
        system_fingerprint=f"fp_{asked.engine.fingerprint[:16]}",
        routing=asked.routing,
        prompt_tokens=max(len(choice.prompt.token_ids) for choice in asked.choices),
        include_usage=asked.wire.include_usage,
        include_reasoning=asked.wire.include_reasoning,
        logprobs=asked.wire.logprobs,
    )
