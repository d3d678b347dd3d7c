"""Every field of a request to the engine has an effect: none is silently ignored.

A request is answered twice, with the field's default and with another value, and the token events
must differ. The same prompt is answered before, so that some of it is cached, and another request
waits with it for the only place in the batch. A new field without a case here fails.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from typing import Any

import pytest

from mi_runtime.config import EngineConfig, GrammarVocabulary, TokenMarks
from mi_runtime.embedded_pair.tokenizer import VOCABULARY_SIZE, build_tokenizer
from mi_runtime.engine import Engine
from mi_runtime.request import Dial, EngineRequest, SamplingParams, ThinkPolicy, TokenEvent
from tests.runtime.conftest import PairOf
from tests.runtime.shared_models import engine_of

PROMPT = tuple(range(100, 112))
OPEN, CLOSE, WORD, OTHER = 2, 3, 20, 21
SALTS = itertools.count()
Answer = Callable[[EngineRequest], list[TokenEvent]]


@dataclass(frozen=True)
class Case:
    """A value of one field, and the other fields that it needs, which both requests have."""

    value: Any
    others: dict[str, Any] = field(default_factory=dict)


def write_only(token: int) -> dict[str, Any]:
    """Returns sampling parameters with which the model writes only this token."""
    return {"logit_bias": ((token, 500.0),)}


ENDS = frozenset(range(VOCABULARY_SIZE)) - {WORD}  # an answer that may not end consists of WORD
OF_SAMPLING = {
    "max_tokens": Case(3),
    "min_tokens": Case(3, {"eos_token_ids": ENDS}),
    "temperature": Case(0.0),
    "top_p": Case(0.01),
    "top_k": Case(1),
    "min_p": Case(1.0),
    "repetition_penalty": Case(10.0, {"temperature": 0.0}),
    "presence_penalty": Case(100.0, {"temperature": 0.0}),
    "frequency_penalty": Case(100.0, {"temperature": 0.0}),
    "logit_bias": Case(((WORD, 100.0),)),
    "seed": Case(1),
    "stop_token_ids": Case(ENDS),
    "eos_token_ids": Case(ENDS),
    "ignore_eos": Case(True, {"eos_token_ids": ENDS}),
    "logprobs": Case(2),
    "prompt_logprobs": Case(1),
}
OPENED = {"opened_by_prompt": True}
OF_THINK = {
    "open_id": Case(OTHER, {"sampling": write_only(OPEN)}),
    "close_id": Case(OTHER, OPENED | {"sampling": write_only(CLOSE)}),
    "opened_by_prompt": Case(True),
    "cap": Case(2, OPENED),
    "closing": Case((WORD, CLOSE), OPENED | {"cap": 2}),
    "soft_window": Case(3, OPENED | {"cap": 4, "sampling": write_only(WORD)}),
    "close_aliases": Case(frozenset({WORD}), OPENED | {"sampling": write_only(WORD)}),
    "forbid_eos": Case(True, OPENED | {"sampling": {"eos_token_ids": ENDS}}),
}
CAPPED = ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, cap=2)
OF_REQUEST = {
    "request_id": Case("another"),
    "prompt": Case(PROMPT[:5]),
    "dial": Case(Dial(1.0)),
    "sampling": Case(SamplingParams(max_tokens=2)),
    "think": Case(CAPPED),
    "cache_salt": Case("another"),
    "answer_dial": Case(Dial(1.0), {"think": CAPPED, "dial": Dial(0.0)}),
    "priority": Case(-1),
    "grammar": Case('start: "{" /[0-9]{1,9}/ "}"'),
}


@pytest.fixture(scope="module")
def engine(pair_of: PairOf, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    instruct, thinking = pair_of("qwen3", vocab_size=VOCABULARY_SIZE)
    tokenizer = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    build_tokenizer().save(str(tokenizer))
    return engine_of(
        EngineConfig(
            str(instruct),
            str(thinking),
            device="cpu",
            dtype="float32",
            num_blocks=64,
            block_size=4,
            max_model_len=64,
            max_num_seqs=1,
            marks=TokenMarks(soft_ends=frozenset({WORD})),
            grammar_vocabulary=GrammarVocabulary(str(tokenizer), (0,)),
        )
    )


@pytest.fixture(scope="module")
def answer(engine: Engine) -> Answer:
    """Returns a cached function of a request's events, as many cases share the default request."""
    return cache(partial(events_of, engine))


def sampling(**params: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 5, "seed": 0, **params})


def request(**others: Any) -> EngineRequest:
    given = {"prompt": PROMPT, "dial": Dial(0.5), "sampling": sampling(), **others}
    return EngineRequest(**{"request_id": "r", **given})


def with_thinking(sampling_params: dict[str, Any] | None = None, **policy: Any) -> EngineRequest:
    think = ThinkPolicy(**{"open_id": OPEN, "close_id": CLOSE, **policy})
    return request(think=think, sampling=sampling(**sampling_params or {}))


def events_of(engine: Engine, submitted: EngineRequest) -> list[TokenEvent]:
    """Returns the events of a request and of its rival, in order and without times."""
    salt = str(next(SALTS))  # so that nothing is cached of the cases before
    first = replace(request(), request_id="first", cache_salt=salt)
    engine.generate([first])
    engine.submit(replace(first, request_id="rival"))
    engine.submit(submitted if submitted.cache_salt else replace(submitted, cache_salt=salt))
    events: list[TokenEvent] = []
    while not engine.idle:
        events += engine.step()
    return [event._replace(queue_seconds=0.0) for event in events]


def field_names(kind: Any) -> list[str]:
    return [each.name for each in fields(kind)]


def test_the_same_request_has_the_same_events(engine: Engine) -> None:
    assert events_of(engine, request()) == events_of(engine, request())


@pytest.mark.parametrize("name", field_names(SamplingParams))
def test_every_sampling_parameter_has_an_effect(answer: Answer, name: str) -> None:
    case = OF_SAMPLING[name]
    default, changed = sampling(**case.others), sampling(**case.others, **{name: case.value})
    assert answer(request(sampling=default)) != answer(request(sampling=changed))


@pytest.mark.parametrize("name", field_names(ThinkPolicy))
def test_every_field_of_a_think_policy_has_an_effect(answer: Answer, name: str) -> None:
    case = OF_THINK[name]
    policy = dict(case.others)
    params = policy.pop("sampling", None)
    changed = with_thinking(params, **policy, **{name: case.value})
    assert answer(with_thinking(params, **policy)) != answer(changed)


@pytest.mark.parametrize("name", field_names(EngineRequest))
def test_every_field_of_an_engine_request_has_an_effect(answer: Answer, name: str) -> None:
    case = OF_REQUEST[name]
    default = request(**case.others)
    assert answer(default) != answer(replace(default, **{name: case.value}))
