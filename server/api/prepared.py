"""A request for an answer, understood: the endpoints make it of what is on the wire, `respond`
answers it. What the two share in understanding stands here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mi_runtime.request import Dial, EngineInfo, SamplingParams
from server.access.callers import Caller
from server.answer.chat_format import CHAT, Form
from server.answer.echo import Echo
from server.engine.sampling import seed_of_choice
from server.ops.request_log import Trace
from server.routing.reasoning_options import budgets, read_reasoning_options
from server.routing.routing_decision import RoutingDecision
from server.service import Service
from server.text.prompt import Prompt
from server.wire.errors import InvalidRequest
from server.wire.generation_request import GenerationRequest


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
    routing: RoutingDecision
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


def route(
    wire: GenerationRequest, header: str | None, service: Service, engine: EngineInfo
) -> RoutingDecision:
    """The dials of a request, with the answer's and the cap."""
    routing = service.lambda_reader.read(
        model=wire.model, body=wire.reasoning_lambda, header=header, layers=engine.layers
    )
    if not service.prompts.vocabulary.has_think_tags:
        refuse_think_fields(wire, "needs think tags that are single tokens, which this model lacks")
    routing = service.lambda_reader.with_answer(routing, wire.answer_lambda)
    return service.routing.route(
        routing, read_reasoning_options(wire), under_load=service.under_load()
    )


def refuse_think_fields(wire: GenerationRequest, why: str) -> None:
    """Where the engine follows no think block."""
    fields = {"answer_lambda": wire.answer_lambda, **budgets(wire)}
    for param, value in fields.items():
        if value is not None and value >= 0:
            raise InvalidRequest(f"`{param}` {why}", param=param)


def copies(start: AskedChoice, count: int) -> list[AskedChoice]:
    """The `n` choices at one λ, which differ in what they draw."""
    sampling = start.sampling
    return [
        replace(start, sampling=replace(sampling, seed=seed_of_choice(sampling.seed, index)))
        for index in range(count)
    ]


def note(trace: Trace, wire: GenerationRequest, routing: RoutingDecision) -> None:
    """What the request's line in the log says of it."""
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
