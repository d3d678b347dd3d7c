"""From an understood request to its answer: the engine's requests, the choices, the response.

Every refusal comes before the 200 is sent.
"""

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mi_runtime.request import EngineRequest, ThinkPolicy
from server.access.deadline import Deadline
from server.answer.answer import Answer, AnswerHead
from server.answer.chat_format import sse
from server.answer.choice import Choice, Observe, unobserved
from server.answer.echo import EchoingChoice
from server.api.disconnect import EventStream, watched
from server.api.prepared import Asked, AskedChoice
from server.engine.generation import ClientLeft
from server.ops.request_log import Trace
from server.routing import requested_lambda
from server.service import Service
from server.text.prompt import Prompt
from server.text.reasoning_parser import PlainText, Splitter
from server.wire.errors import DeadlineExceeded, RateLimited, Unavailable

CLIENT_CLOSED_REQUEST: Final = 499  # nobody reads it; it stands in the log


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
    headers = {requested_lambda.HEADER: asked.routing.header}
    if asked.wire.stream:
        writer = asked.form.writer(answer.head)
        events = sse(answer, writer, keep_alive=service.settings.keep_alive)
        return EventStream(events, answer.generation, headers)
    try:
        async with watched(answer.generation, request.receive):
            return JSONResponse(await asked.form.whole(answer), headers=headers)
    except ClientLeft:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


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
