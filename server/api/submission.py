"""Submits a prepared request to the engine, one engine request for each choice.

What this process refuses is refused here or earlier, before a status is sent.
"""

import time
from functools import partial

from mi_runtime.request import EngineRequest, ThinkPolicy
from server.answer.answer import Answer, AnswerHead
from server.answer.choice import Choice, ObserveReasoning
from server.api.prepared_request import PreparedChoice, PreparedRequest
from server.service import Service
from server.text.prompt import Prompt
from server.text.reasoning_parser import PlainText, Splitter


def submit(prepared: PreparedRequest, service: Service) -> Answer:
    """Submits the request and returns its answer.

    This function never awaits, so the caller's other requests cannot come between the check of its
    quota and the charge. Raises `Unavailable`, `RateLimited` or `InvalidRequest`.
    """
    requests = _engine_requests(prepared, service)
    service.admit()
    service.rate_limits.check_tokens(prepared.caller)
    generation = service.engine.submit(requests)
    charge = partial(service.rate_limits.charge, prepared.caller)
    charge(prepared.prompt_tokens)
    prepared.deadline.apply_to(generation)
    _count_submission(prepared, service)
    choices = {
        request.request_id: _choice(index, prepared, service)
        for index, request in enumerate(requests)
    }
    return Answer(_head(prepared), choices, generation, prepared.notes, charge)


def _engine_requests(prepared: PreparedRequest, service: Service) -> list[EngineRequest]:
    number = next(service.request_numbers)
    decision = prepared.decision
    return [
        EngineRequest(
            request_id=f"{number}-{index}",
            prompt=choice.prompt.token_ids,
            dial=choice.dial,
            sampling=choice.sampling,
            think=_think_policy(choice.prompt, prepared, service),
            cache_salt=prepared.caller.cache_salt(prepared.wire.cache_salt),
            answer_dial=None if decision.answer_dial == choice.dial else decision.answer_dial,
            priority=prepared.wire.priority,
            grammar=prepared.grammar,
        )
        for index, choice in enumerate(prepared.choices)
    ]


def _think_policy(
    prompt: Prompt, prepared: PreparedRequest, service: Service
) -> ThinkPolicy | None:
    if prompt.is_raw:
        return None
    return service.think_blocks.policy(
        opened_by_prompt=prompt.opens_block,
        cap=prepared.decision.cap,
        tools=prepared.tools,
        constrained=prepared.grammar is not None,
    )


def _count_submission(prepared: PreparedRequest, service: Service) -> None:
    service.metrics.routed(prepared.decision)
    notes = prepared.notes
    notes.fields["prepare_s"] = round(time.perf_counter() - notes.arrived, 4)


def _choice(index: int, prepared: PreparedRequest, service: Service) -> Choice:
    choice, vocabulary = prepared.choices[index], service.prompt_builder.vocabulary
    answer_format = prepared.answer_format
    wants_logprobs = prepared.wire.alternatives is not None
    return Choice(
        index,
        vocabulary=vocabulary,
        splitter=_splitter(choice.prompt, prepared, service),
        stop=prepared.wire.stop_strings,
        meter=service.metrics.meter(
            choice.dial.reasoning_lambda,
            len(choice.prompt.token_ids),
            prepared.notes.arrived,
            cap=prepared.decision.cap,
        ),
        write_logprobs=answer_format.logprobs_writer(vocabulary) if wants_logprobs else None,
        echo=choice.echo,
        observe=_observer(choice, prepared, service),
        tools=prepared.tools,
        field_names=prepared.field_names,
    )


def _splitter(prompt: Prompt, prepared: PreparedRequest, service: Service) -> Splitter:
    if prompt.is_raw:
        return PlainText()
    return service.think_blocks.splitter(opened_by_prompt=prompt.opens_block, tools=prepared.tools)


def _observer(
    choice: PreparedChoice, prepared: PreparedRequest, service: Service
) -> ObserveReasoning | None:
    """Returns the function that adds a choice's reasoning tokens to those of its routing class.

    None for raw prompts and dials by blend group, which belong to no class's curve.
    """
    name, value = prepared.decision.routing_class, choice.dial.reasoning_lambda
    has_tags = service.prompt_builder.vocabulary.has_think_tags
    if choice.prompt.is_raw or choice.dial.groups or name is None or not has_tags:
        return None
    observations = service.router.observed_lengths
    return lambda tokens, cut: observations.add(name, value, tokens, cut=cut)


def _head(prepared: PreparedRequest) -> AnswerHead:
    notes = prepared.notes
    prefixed = f"{prepared.answer_format.id_prefix}-{notes.request_id}"
    return AnswerHead(
        id=notes.request_id if notes.given else prefixed,
        created=int(time.time()),
        model=prepared.wire.model,
        system_fingerprint=f"fp_{prepared.info.fingerprint[:16]}",
        decision=prepared.decision,
        prompt_tokens=prepared.prompt_tokens,
        prompt_count=prepared.prompt_count,
        include_usage=prepared.wire.include_usage,
        include_reasoning=prepared.include_reasoning,
        logprobs=prepared.wire.alternatives is not None,
    )
