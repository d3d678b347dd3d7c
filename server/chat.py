"""`POST /v1/chat/completions`: from a wire request to an answer, every refusal before the 200.

What does not depend on the form of prompt and answer serves `server.completions` too.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mi_runtime.request import Dial, EngineInfo, EngineRequest, SamplingParams, ThinkPolicy
from server import dial
from server.answer import Answer, AnswerHead
from server.callers import Caller
from server.choice import Choice, Observe, unobserved
from server.deadline import Deadline
from server.dial import Routing
from server.echo import Echo, EchoingChoice
from server.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    InvalidRequest,
    RateLimited,
    Unavailable,
)
from server.generation import ClientLeft
from server.inputs import budgets, read_inputs
from server.prompt import Ending, Prompt
from server.reasoning import PlainText, Splitter
from server.rendering import CHAT, Form, sse
from server.request_log import Trace
from server.sampling import seed_of_choice
from server.schemas import ChatRequest, GenerationRequest, parse_chat_request
from server.service import Service
from server.watching import EventStream, watched

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it stands in the log


@dataclass(frozen=True, slots=True)
class AskedChoice:
    """What one choice starts from."""

    dial: Dial
    prompt: Prompt
    sampling: SamplingParams
    echo: Echo | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for an answer, understood."""

    wire: GenerationRequest
    routing: Routing
    choices: Sequence[AskedChoice]
    engine: EngineInfo
    trace: Trace
    caller: Caller
    form: Form = CHAT
    prompts: int = 1  # each of them with as many choices
    include_reasoning: bool = True
    tools: bool = False  # the model may call some
    grammar: str | None = None  # that every choice's answer obeys

    @property
    def prompt_tokens(self) -> int:
        """Every prompt once; of the prompts that a fan-out makes of one, the longest."""
        lengths = [len(choice.prompt.token_ids) for choice in self.choices]
        each = len(lengths) // self.prompts
        return sum(max(lengths[start : start + each]) for start in range(0, len(lengths), each))


async def chat_completions(request: Request, service: Service) -> Response:
    return await respond(request, service, _understand)


async def respond(
    request: Request,
    service: Service,
    understand: Callable[[Request, Service, Trace], Awaitable[Asked]],
) -> Response:
    """The answer to what `understand` makes of a request. Raises what is refused."""
    deadline: Deadline = request.state.deadline
    try:
        service.admitted()  # before the body is read
        service.engine.check_room()
        async with deadline.kept():
            asked = await understand(request, service, request.state.trace)
        answer = _submit(asked, service)
    except (Unavailable, RateLimited, DeadlineExceeded) as error:
        service.metrics.rejected(error.code)
        raise
    deadline.bound(answer.generation)
    headers = {dial.HEADER: asked.routing.header}
    if asked.wire.stream:
        writer = asked.form.writer(answer.head)
        events = sse(answer, writer, keep_alive=service.settings.keep_alive)
        return EventStream(events, answer.generation, headers)
    try:
        async with watched(answer.generation, request.receive):
            return JSONResponse(await asked.form.whole(answer), headers=headers)
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


async def _understand(request: Request, service: Service, trace: Trace) -> Asked:
    """Everything that can be refused is refused here."""
    wire = parse_chat_request(await read_body(request, service.settings.max_body_bytes))
    engine = service.admitted()
    routing = route(wire, request.headers.get(dial.HEADER), service, engine)
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


def route(
    wire: GenerationRequest, header: str | None, service: Service, engine: EngineInfo
) -> Routing:
    """The dials of a request, with the answer's and the cap."""
    routing = service.dials.route(
        model=wire.model, body=wire.reasoning_lambda, header=header, layers=engine.layers
    )
    if not service.prompts.vocabulary.has_think_tags:
        refuse_think_fields(wire, "needs think tags that are single tokens, which this model lacks")
    routing = service.dials.with_answer(routing, wire.answer_lambda)
    return service.routing.route(routing, read_inputs(wire), under_load=service.under_load())


def refuse_think_fields(wire: GenerationRequest, why: str) -> None:
    """Where the engine follows no think block."""
    fields = {"answer_lambda": wire.answer_lambda, **budgets(wire)}
    for param, value in fields.items():
        if value is not None and value >= 0:
            raise InvalidRequest(f"`{param}` {why}", param=param)


def _prepare(
    wire: ChatRequest, routing: Routing, ending: Ending, service: Service
) -> tuple[str | None, list[Prompt]]:
    """What the answer obeys, and the prompt at each dial."""
    grammar = service.constraint.grammar(wire)
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


def copies(start: AskedChoice, count: int) -> list[AskedChoice]:
    """The `n` choices at one λ, which differ in what they draw."""
    sampling = start.sampling
    return [
        replace(start, sampling=replace(sampling, seed=seed_of_choice(sampling.seed, index)))
        for index in range(count)
    ]


def note(trace: Trace, wire: GenerationRequest, routing: Routing) -> None:
    trace.notes |= {
        "model": wire.model,
        "lambda": routing.header,
        "source": routing.source,
        "stream": int(wire.stream),
        **({} if routing.answer is None else {"answer_lambda": wire.answer_lambda}),
        **({} if routing.cap is None else {"cap": routing.cap}),
        **({"elastic": 1} if routing.elastic else {}),
        **({"user": wire.user} if wire.user else {}),
        **({"metadata": wire.metadata} if wire.metadata else {}),
    }


def _submit(asked: Asked, service: Service) -> Answer:
    """Hand the choices to the engine, each as a request of its own."""
    requests = _engine_requests(asked, service)
    service.rate_limits.check_tokens(asked.caller)
    generation = service.engine.submit(requests)
    service.metrics.routed(asked.routing)
    asked.trace.notes["prepare_s"] = round(time.perf_counter() - asked.trace.arrived, 4)
    service.rate_limits.spend(asked.caller, asked.prompt_tokens)
    choices = {
        request.request_id: _choice(index, asked, service) for index, request in enumerate(requests)
    }
    return Answer(_head(asked), choices, generation, notes=asked.trace.notes)


def _engine_requests(asked: Asked, service: Service) -> list[EngineRequest]:
    number = service.next_request_number()
    routing = asked.routing
    return [
        EngineRequest(
            request_id=f"{number}-{index}",
            prompt=choice.prompt.token_ids,
            dial=choice.dial,
            sampling=choice.sampling,
            think=_think_policy(choice.prompt, asked, service),
            cache_salt=asked.caller.cache_salt(asked.wire.cache_salt),
            answer_dial=None if routing.answer == choice.dial else routing.answer,
            priority=asked.wire.priority,
            grammar=asked.grammar,
        )
        for index, choice in enumerate(asked.choices)
    ]


def _think_policy(prompt: Prompt, asked: Asked, service: Service) -> ThinkPolicy | None:
    if prompt.is_raw:
        return None
    return service.think_blocks.policy(
        opened_by_prompt=prompt.opens_block,
        cap=asked.routing.cap,
        tools=asked.tools,
        constrained=asked.grammar is not None,
    )


def _choice(index: int, asked: Asked, service: Service) -> Choice:
    start, vocabulary = asked.choices[index], service.prompts.vocabulary
    write_logprobs = asked.form.logprobs(vocabulary)
    make: Callable[..., Choice] = Choice
    if start.echo is not None:
        make = partial(EchoingChoice, echo=start.echo)
    return make(
        index,
        vocabulary=vocabulary,
        splitter=_splitter(start.prompt, asked, service),
        stop=asked.wire.stop_strings,
        meter=service.metrics.meter(
            start.dial.reasoning_lambda,
            len(start.prompt.token_ids),
            asked.trace.arrived,
            cap=asked.routing.cap,
        ),
        logprobs=None if asked.wire.alternatives is None else write_logprobs,
        observe=_observer(start, asked, service),
        tools=asked.tools,
    )


def _observer(start: AskedChoice, asked: Asked, service: Service) -> Observe:
    """A raw prompt is no work of any class."""
    return unobserved if start.prompt.is_raw else service.observer(start.dial, asked.routing)


def _splitter(prompt: Prompt, asked: Asked, service: Service) -> Splitter:
    if prompt.is_raw:
        return PlainText()
    return service.think_blocks.splitter(opened_by_prompt=prompt.opens_block, tools=asked.tools)


def _head(asked: Asked) -> AnswerHead:
    trace = asked.trace
    return AnswerHead(
        id=trace.request_id if trace.given else f"{asked.form.id_prefix}-{trace.request_id}",
        created=int(time.time()),
        model=asked.wire.model,
        system_fingerprint=f"fp_{asked.engine.fingerprint[:16]}",
        routing=asked.routing,
        prompt_tokens=asked.prompt_tokens,
        prompts=asked.prompts,
        include_usage=asked.wire.include_usage,
        include_reasoning=asked.include_reasoning,
        logprobs=asked.wire.alternatives is not None,
    )
