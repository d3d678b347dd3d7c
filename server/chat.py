"""`POST /v1/chat/completions`: from a wire request to an answer, every refusal before the 200."""

import asyncio
import time
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mi_runtime.request import EngineInfo, EngineRequest, SamplingParams
from server import dial
from server.answer import Answer, AnswerHead
from server.choice import Choice
from server.dial import Routing
from server.errors import BodyTooLarge, Unavailable
from server.generation import ClientLeft
from server.prompt import Prompt
from server.reasoning import ReasoningSplitter
from server.rendering import completion, sse
from server.request_log import Trace
from server.sampling import seed_of_choice
from server.schemas import ChatRequest, parse_chat_request
from server.service import Service
from server.watching import EventStream, watched

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it stands in the log


@dataclass(frozen=True, slots=True)
class _Asked:
    """A chat request, understood."""

    wire: ChatRequest
    routing: Routing
    prompt: Prompt
    sampling: SamplingParams
    engine: EngineInfo
    trace: Trace


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
    header = request.headers.get(dial.HEADER)
    routing = service.dials.route(model=wire.model, body=wire.reasoning_lambda, header=header)
    # In a thread: a long prompt takes as long to encode as a hundred tokens take to send.
    prompt = await asyncio.to_thread(service.prompts.build, wire.messages, routing.dial)
    engine = service.admitted()
    sampling = service.sampling.resolve(wire, prompt_tokens=len(prompt.token_ids), engine=engine)
    trace.notes |= {
        "lambda": routing.header,
        "source": routing.source,
        "stream": int(wire.stream),
        **({"user": wire.user} if wire.user else {}),
        **({"metadata": wire.metadata} if wire.metadata else {}),
    }
    return _Asked(wire, routing, prompt, sampling, engine, trace)


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
    return [
        EngineRequest(
            request_id=f"{number}-{index}",
            prompt=asked.prompt.token_ids,
            dial=asked.routing.dial,
            sampling=replace(asked.sampling, seed=seed_of_choice(asked.sampling.seed, index)),
            think=service.prompts.think_tags(asked.prompt),
            cache_salt=asked.wire.cache_salt,
        )
        for index in range(asked.wire.n)
    ]


def _choice(index: int, asked: _Asked, service: Service) -> Choice:
    vocabulary = service.prompts.vocabulary
    opened = asked.prompt.opens_block
    return Choice(
        index,
        vocabulary=vocabulary,
        splitter=(
            ReasoningSplitter.of_prompt(opened=opened, closing=vocabulary.closing_tags)
            if vocabulary.has_think_tags or opened
            else ReasoningSplitter.without_tags()
        ),
        stop=asked.wire.stop_strings,
        meter=service.metrics.meter(
            asked.routing.dial.reasoning_lambda, len(asked.prompt.token_ids), asked.trace.arrived
        ),
        logprobs=asked.wire.logprobs,
    )


def _head(asked: _Asked) -> AnswerHead:
    trace = asked.trace
    return AnswerHead(
        id=trace.request_id if trace.given else f"chatcmpl-{trace.request_id}",
        created=int(time.time()),
        model=asked.wire.model,
        system_fingerprint=f"fp_{asked.engine.fingerprint[:16]}",
        routing=asked.routing,
        prompt_tokens=len(asked.prompt.token_ids),
        include_usage=asked.wire.include_usage,
        include_reasoning=asked.wire.include_reasoning,
        logprobs=asked.wire.logprobs,
    )
