"""A request for an answer, read and checked, and the steps that both routes take to prepare it.

`chat` and `completions` prepare requests, and `submission` submits them to the engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mi_runtime.request import Dial, EngineInfo, SamplingParams
from server.access.callers import Caller
from server.access.deadline import Deadline
from server.answer.answer_format import AnswerFormat
from server.answer.echo import Echo
from server.engine.sampling import seed_of_choice
from server.ops.request_log import RequestNotes
from server.routing.reasoning_options import budgets, read_reasoning_options
from server.routing.routing_decision import RoutingDecision
from server.service import Service
from server.text.prompt import Prompt
from server.wire.errors import InvalidRequest
from server.wire.generation_request import GenerationRequest


@dataclass(frozen=True, slots=True)
class PreparedChoice:
    """What one choice is made from: λ, prompt, sampling parameters, and a prompt to repeat."""

    dial: Dial
    prompt: Prompt
    sampling: SamplingParams
    echo: Echo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that can be submitted to the engine."""

    wire: GenerationRequest
    decision: RoutingDecision
    choices: Sequence[PreparedChoice]
    info: EngineInfo
    notes: RequestNotes
    caller: Caller
    deadline: Deadline
    answer_format: AnswerFormat
    prompt_count: int = 1  # each has the same number of choices
    include_reasoning: bool = True
    tools: bool = False  # the model may call some
    grammar: str | None = None  # that the answers of all choices follow

    @property
    def field_names(self) -> Mapping[str, str]:
        """The request's names of the engine's fields, where they differ."""
        grammar = "tools" if self.tools else "response_format"
        return {"prompt": self.wire.prompt_field, "grammar": grammar}

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts. A prompt counts once, however many choices it has.

        In a fan-out one prompt may be written with two templates; then the longer one counts.
        """
        lengths = [len(choice.prompt.token_ids) for choice in self.choices]
        each = len(lengths) // self.prompt_count
        return sum(max(lengths[start : start + each]) for start in range(0, len(lengths), each))


def route(
    wire: GenerationRequest, header: str | None, service: Service, info: EngineInfo
) -> RoutingDecision:
    """Chooses λ: returns the routing decision of a request, with the λ and the cap it runs at.

    Raises `InvalidRequest` or `ModelNotFound`.
    """
    requested = service.lambda_reader.read(
        model=wire.model, body=wire.reasoning_lambda, header=header, layers=info.layers
    )
    if not service.prompt_builder.vocabulary.has_think_tags:
        refuse_think_fields(
            wire, "is not supported for this model: its think tags are not single tokens"
        )
    requested = service.lambda_reader.with_answer(requested, wire.answer_lambda)
    return service.router.decide(
        requested, read_reasoning_options(wire), under_load=service.update_load()
    )


def refuse_think_fields(wire: GenerationRequest, why: str) -> None:
    """Raises `InvalidRequest` for a field that needs the engine to track a think block."""
    fields = {"answer_lambda": wire.answer_lambda, **budgets(wire)}
    for param, value in fields.items():
        if value is not None and value >= 0:
            raise InvalidRequest(f"`{param}` {why}", param=param)


def seeded_choices(choice: PreparedChoice, count: int) -> list[PreparedChoice]:
    """Returns `count` copies of a choice with different seeds."""
    sampling = choice.sampling
    return [
        replace(choice, sampling=replace(sampling, seed=seed_of_choice(sampling.seed, index)))
        for index in range(count)
    ]


def add_log_fields(notes: RequestNotes, wire: GenerationRequest, decision: RoutingDecision) -> None:
    """Adds the facts of a request to its line in the log."""
    notes.fields |= {
        "model": wire.model,
        "lambda": decision.header,
        "source": decision.source,
        "stream": int(wire.stream),
        **({} if decision.answer_dial is None else {"answer_lambda": wire.answer_lambda}),
        **({} if decision.cap is None else {"cap": decision.cap}),
        **({"elastic": 1} if decision.elastic else {}),
        **({"user": wire.user} if wire.user else {}),
        **({"metadata": wire.metadata} if wire.metadata else {}),
    }
