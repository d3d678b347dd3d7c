"""An answer under a grammar follows it, first in the state alone, then in an engine.

The engine's random model would write anything. The oracle is the `jsonschema` package: whatever is
drawn, at any temperature, in any batch, must be an instance of the schema.
"""

import json
import random
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import Tokenizer, models

from mi_runtime.config import EngineConfig, GrammarVocabulary, TokenMarks
from mi_runtime.embedded_pair.tokenizer import VOCABULARY_SIZE, build_tokenizer
from mi_runtime.engine import Engine
from mi_runtime.execution.logits_processors import _forbidden
from mi_runtime.request import (
    Dial,
    EngineRequest,
    FinishReason,
    Phase,
    RequestRejected,
    SamplingParams,
    ThinkPolicy,
    TokenEvent,
)
from mi_runtime.scheduling.grammar import MOST_KEPT, Grammars, GrammarState
from mi_runtime.scheduling.thinking import ThinkingState
from tests.runtime.conftest import MakeEngine, PairOf
from tests.runtime.shared_models import engine_of

TOKENIZER = build_tokenizer()
EOS, OPEN, CLOSE = (TOKENIZER.token_to_id(text) for text in ("<|im_end|>", "<think>", "</think>"))
BREAK, BREAKS = TOKENIZER.encode("\n").ids[0], TOKENIZER.encode("\n\n").ids[0]
LETTER = TOKENIZER.token_to_id("x")
CLOSING = (BREAK, CLOSE, BREAKS)
DIGITS = 'start: "{" /[0-9]{1,3}/ "}"'
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}

FEW_EXAMPLES = settings(  # each is an answer of a model
    max_examples=settings.default.max_examples // 10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def json_grammar(schema: dict[str, Any]) -> str:
    """Returns the grammar of a schema, without white space."""
    options = {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> GrammarVocabulary:
    """Returns the vocabulary of the embedded pair."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return GrammarVocabulary(str(path), (EOS,))


@pytest.fixture(scope="session")
def grammars(vocabulary: GrammarVocabulary) -> Grammars:
    return Grammars(vocabulary)


def thinking(*, opened: bool = False, cap: int | None = None) -> ThinkingState:
    policy = ThinkPolicy(OPEN, CLOSE, opened, cap, CLOSING, forbid_eos=True)
    whitespace = frozenset({BREAK, BREAKS, *encode(" ")})
    return ThinkingState(policy, TokenMarks(whitespace=whitespace))


def observe_all(state: GrammarState, block: ThinkingState | None, tokens: Sequence[int]) -> None:
    """Passes tokens to the grammar's state and to the think block."""
    for token_id in tokens:
        state.observe(token_id)
        if block is not None:
            block.observe(token_id)


def allowed(state: GrammarState) -> set[int]:
    """Returns the token ids that may come next."""
    mask = state.mask()
    ids = {index for index in range(len(mask) * 8) if mask[index // 8] >> index % 8 & 1}
    return ids | ({state.extra_token} - {None})  # type: ignore[arg-type]


# --- the state alone ---


def test_without_a_think_block_the_grammar_constrains_the_first_token(grammars: Grammars) -> None:
    state = grammars.state(DIGITS, None)
    assert state.constrains
    assert allowed(state) == set(encode("{"))
    observe_all(state, None, encode("{4"))
    assert allowed(state) == set(encode("0123456789}"))


def test_tokens_inside_a_block_are_not_constrained(grammars: Grammars) -> None:
    block = thinking(opened=True)
    state = grammars.state(DIGITS, block)
    for token_id in [LETTER, *encode("}"), BREAK]:
        assert not state.constrains
        observe_all(state, block, [token_id])
    assert state.failure is None
    observe_all(state, block, [CLOSE])
    assert state.constrains


def test_the_first_token_may_open_a_block(grammars: Grammars) -> None:
    block = thinking()
    state = grammars.state(DIGITS, block)
    assert allowed(state) == {*encode("{"), OPEN}
    observe_all(state, block, [OPEN, LETTER, CLOSE])
    assert (block.phase, state.failure) == (Phase.CLOSED, None)
    assert allowed(state) == {*encode("{"), BREAKS}


def test_after_the_first_token_of_the_answer_no_block_may_open(grammars: Grammars) -> None:
    block = thinking()
    state = grammars.state(DIGITS, block)
    observe_all(state, block, encode("{"))
    assert OPEN not in allowed(state)


def test_after_its_own_closing_tag_the_model_may_write_the_line_breaks_once(
    grammars: Grammars,
) -> None:
    block = thinking(opened=True)
    state = grammars.state(DIGITS, block)
    observe_all(state, block, [CLOSE, BREAKS])
    assert allowed(state) == set(encode("{"))
    observe_all(state, block, encode("{4}"))
    assert state.complete


def test_the_forced_closing_sequence_is_not_constrained(grammars: Grammars) -> None:
    block = thinking(opened=True, cap=1)
    state = grammars.state(DIGITS, block)
    observe_all(state, block, [LETTER])
    for token_id in CLOSING:
        assert not state.constrains
        assert block.forced_token == token_id
        observe_all(state, block, [token_id])
    assert state.constrains
    assert allowed(state) == set(encode("{"))  # the line breaks are written


def test_an_end_token_is_allowed_once_the_answer_is_complete(grammars: Grammars) -> None:
    state = grammars.state("start: /[0-9]{1,3}/", None)
    assert EOS not in allowed(state)
    observe_all(state, None, encode("4"))
    assert EOS in allowed(state)
    assert not state.complete
    observe_all(state, None, encode("25"))
    assert state.complete
    assert allowed(state) == {EOS}


def test_a_token_that_breaks_the_grammar_is_a_failure(grammars: Grammars) -> None:
    state = grammars.state(DIGITS, None)
    observe_all(state, None, [LETTER])
    assert state.failure is not None
    assert state.mask() == b""


@pytest.mark.parametrize("source", ["start: nothing", 'start: "a', "{]", '{"grammars": []}'])
def test_a_grammar_that_does_not_compile_is_a_failure(grammars: Grammars, source: str) -> None:
    state = grammars.state(source, None)
    assert state.mask() == b""
    assert state.failure is not None
    assert len(state.failure) <= 200


def test_a_tokenizer_that_the_library_cannot_read_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(path))
    state = Grammars(GrammarVocabulary(str(path), (1,))).state(DIGITS, None)
    assert state.mask() == b""
    assert state.failure is not None


def test_without_the_library_a_grammar_is_a_failure_that_names_it(
    vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    state = Grammars(vocabulary).state(DIGITS, None)
    assert state.mask() == b""
    assert "llguidance" in (state.failure or "")


def test_sequences_with_one_grammar_have_separate_states(grammars: Grammars) -> None:
    one, other = grammars.state(DIGITS, None), grammars.state(DIGITS, None)
    observe_all(one, None, encode("{12"))
    assert allowed(other) == set(encode("{"))


def test_evicted_grammars_are_compiled_again(vocabulary: GrammarVocabulary) -> None:
    grammars = Grammars(vocabulary)
    states = [grammars.state(f'start: "{n}"', None) for n in range(MOST_KEPT + 2)]
    again = grammars.state('start: "0"', None)
    assert allowed(states[0]) == allowed(again) == set(encode("0"))


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=3), st.integers(1, 99))
def test_tokens_without_a_bit_in_the_mask_are_forbidden(
    masks: list[bytes], vocabulary: int
) -> None:
    forbidden = _forbidden(masks, torch.zeros(len(masks), vocabulary))
    for row, mask in enumerate(masks):
        bits = [byte >> bit & 1 for byte in mask for bit in range(8)][:vocabulary]
        bits += [0] * (vocabulary - len(bits))
        assert forbidden[row].tolist() == [not bit for bit in bits]


# --- an engine ---


@pytest.fixture(scope="session")
def directories(pair_of: PairOf) -> tuple[Path, Path]:
    return pair_of("qwen3", vocab_size=VOCABULARY_SIZE + 7)  # as models pad theirs


@pytest.fixture(scope="session")
def engine(directories: tuple[Path, Path], vocabulary: GrammarVocabulary) -> Engine:
    return build(directories, vocabulary)


def build(directories: tuple[Path, Path], vocabulary: GrammarVocabulary, **changes: Any) -> Engine:
    instruct, thinking = map(str, directories)
    small: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "num_blocks": 128,
        "block_size": 4,
        "grammar_vocabulary": vocabulary,
    }
    return engine_of(EngineConfig(instruct, thinking, **small | changes))


def request(
    name: str, grammar: str | None, think: ThinkPolicy | None = None, **params: Any
) -> EngineRequest:
    sampling = {"max_tokens": 120, "seed": 5, "eos_token_ids": frozenset({EOS})} | params
    return EngineRequest(
        name, (5, 6, 7), Dial(0.5), SamplingParams(**sampling), think, grammar=grammar
    )


def run(engine: Engine, *requests: EngineRequest) -> dict[str, list[TokenEvent]]:
    answers = engine.generate(requests)
    engine.scheduler.check_integrity()
    return answers


def answer_tokens(events: list[TokenEvent]) -> list[int]:
    """Returns the tokens of an answer, without the end token that stopped it."""
    ended = events[-1].finish_reason is FinishReason.STOP
    tokens = [event.token_id for event in events[: -1 if ended else None]]
    return [token_id for token_id in tokens if token_id is not None]


def text_of(events: list[TokenEvent]) -> str:
    return str(TOKENIZER.decode(answer_tokens(events), skip_special_tokens=False))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_random_model_answers_with_an_instance_of_the_schema(
    engine: Engine, temperature: float
) -> None:
    names = [f"{temperature}-{index}" for index in range(6)]
    grammar = json_grammar(SCHEMA)
    answers = run(
        engine,
        *(
            request(name, grammar, temperature=temperature, seed=seed)
            for seed, name in enumerate(names)
        ),
    )
    for events in answers.values():
        assert events[-1].finish_reason in (FinishReason.COMPLETE, FinishReason.STOP)
        jsonschema.validate(json.loads(text_of(events)), SCHEMA)


LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"enum": ["a", 1, None]},
        {"const": {"k": [1]}},
    ]
)


def compound(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2})
    unions = st.lists(inner, min_size=1, max_size=2).map(lambda any_of: {"anyOf": any_of})
    names = st.sampled_from(["a", "b", "the question"])
    objects = st.dictionaries(names, inner, max_size=3).map(
        lambda properties: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties),
            "additionalProperties": False,
        }
    )
    return arrays | unions | objects


SCHEMAS = st.recursive(LEAVES, compound, max_leaves=5)


@FEW_EXAMPLES
@given(SCHEMAS, st.sampled_from([1.0, 2.0]), st.integers(0, 2**31))
def test_an_answer_is_an_instance_of_any_schema(
    engine: Engine, schema: dict[str, Any], temperature: float, seed: int
) -> None:
    fields: dict[str, Any] = {"temperature": temperature, "max_tokens": 100, "seed": seed}
    (events,) = run(engine, request("r", json_grammar(schema), **fields)).values()
    if events[-1].finish_reason is not FinishReason.LENGTH:
        jsonschema.validate(json.loads(text_of(events)), schema)


def test_answers_are_the_same_in_a_batch_of_rows_with_and_without_grammars(engine: Engine) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "max_tokens": 40}
    requests = [
        request("json", json_grammar(SCHEMA), **fields),
        request("free", None, **fields),
        request("digits", DIGITS, **fields),
        request("json again", json_grammar(SCHEMA), **fields | {"seed": 6}),
    ]
    together = run(engine, *requests)
    for one in requests:
        (alone,) = run(engine, one).values()
        assert answer_tokens(together[one.request_id]) == answer_tokens(alone), one.request_id


def test_preemption_does_not_change_an_answer_under_a_grammar(
    directories: tuple[Path, Path], vocabulary: GrammarVocabulary, engine: Engine
) -> None:
    tight = build(directories, vocabulary, num_blocks=12, prefix_caching=False)
    requests = [
        request(f"r{n}", json_grammar(SCHEMA), temperature=1.0, seed=n, max_tokens=40)
        for n in range(4)
    ]
    answers = run(tight, *requests)
    assert tight.scheduler.preemptions
    for one in requests:
        (alone,) = run(engine, one).values()
        assert answer_tokens(answers[one.request_id]) == answer_tokens(alone)


def test_the_last_token_of_a_complete_answer_ends_it_without_an_end_token(engine: Engine) -> None:
    (events,) = run(engine, request("r", DIGITS)).values()
    assert events[-1].finish_reason is FinishReason.COMPLETE
    assert events[-1].token_id == encode("}")[0]


@pytest.mark.parametrize("params", [{"min_tokens": 50}, {"ignore_eos": True}])
def test_a_complete_answer_ends_even_if_end_tokens_are_forbidden(
    engine: Engine, params: dict[str, Any]
) -> None:
    (events,) = run(engine, request("r", DIGITS, **params)).values()
    assert events[-1].finish_reason is FinishReason.COMPLETE


def test_with_ignore_eos_an_answer_is_as_long_as_the_grammar_allows(
    engine: Engine,
) -> None:
    fields: dict[str, Any] = {"ignore_eos": True, "temperature": 1.0}
    (events,) = run(engine, request("r", "start: /[0-9]{1,9}/", **fields)).values()
    assert len(answer_tokens(events)) == 9


def test_an_answer_without_an_allowed_token_is_complete(engine: Engine) -> None:
    """The grammar requires a stop token, and stop tokens are forbidden before `min_tokens`."""
    brace = encode("}")[0]
    fields: dict[str, Any] = {"stop_token_ids": frozenset({brace}), "min_tokens": 50}
    (events,) = run(engine, request("r", 'start: "{4}"', **fields)).values()
    assert (events[-1].token_id, events[-1].finish_reason) == (None, FinishReason.COMPLETE)
    assert text_of(events) == "{4"


def test_a_stop_token_ends_an_answer_before_it_is_complete(engine: Engine) -> None:
    fields: dict[str, Any] = {"stop_token_ids": frozenset(encode("4"))}
    (events,) = run(engine, request("r", 'start: "{4}"', **fields)).values()
    assert events[-1].finish_reason is FinishReason.STOP


def test_a_bias_cannot_override_the_grammar(engine: Engine) -> None:
    fields: dict[str, Any] = {"logit_bias": ((LETTER, 100.0),), "logprobs": 0}
    (events,) = run(engine, request("r", DIGITS, **fields)).values()
    assert LETTER not in answer_tokens(events)


def test_logprobs_under_a_grammar_are_the_models_own(engine: Engine) -> None:
    """Under the grammar one token is certain; the model gives it a low probability."""
    (events,) = run(engine, request("r", DIGITS, logprobs=0)).values()
    assert events[0].logprobs is not None
    assert events[0].logprobs.token < -1.0


def test_a_failing_grammar_fails_its_request_alone(engine: Engine) -> None:
    answers = run(engine, request("bad", "start: nothing"), request("good", DIGITS))
    (end,) = answers["bad"]
    assert end.finish_reason is FinishReason.ERROR
    assert "grammar" in (end.error or "")
    assert answers["good"][-1].finish_reason is FinishReason.COMPLETE


class Gate:
    """Blocks the thread that compiles grammars until the gate is opened."""

    def __init__(self, engine: Engine) -> None:
        self._open = threading.Event()
        assert engine._grammars is not None
        engine._grammars._thread.submit(self._open.wait)

    def open(self) -> None:
        self._open.set()


def test_a_request_does_not_wait_for_the_grammar_of_another(engine: Engine) -> None:
    gate = Gate(engine)
    engine.submit(request("held", 'start: "held"'))
    assert engine.stats().waiting == 1
    free = events_of(engine, request("free", None, max_tokens=5))
    assert len(free) == 5
    assert not engine.idle
    gate.open()
    assert events_until_end(engine, "held")[-1].finish_reason is FinishReason.COMPLETE
    assert engine.idle


def test_an_engine_with_only_a_waiting_grammar_still_takes_requests(engine: Engine) -> None:
    """It once waited until the grammar was compiled, and took neither requests nor aborts."""
    gate = Gate(engine)
    engine.submit(request("held", 'start: "held alone"'))
    assert engine.step() == []
    assert len(events_of(engine, request("free", None, max_tokens=5))) == 5
    assert engine.abort("held") is not None
    assert engine.idle
    gate.open()


def events_of(engine: Engine, one: EngineRequest) -> list[TokenEvent]:
    """Submits a request, and returns its events."""
    engine.submit(one)
    return events_until_end(engine, one.request_id)


def events_until_end(engine: Engine, request_id: str) -> list[TokenEvent]:
    """Runs the engine until this request ends, and returns its events, which must be all."""
    events: list[TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        events += engine.step()
    assert {event.request_id for event in events} == {request_id}
    return events


def test_a_request_may_be_aborted_while_its_grammar_compiles(engine: Engine) -> None:
    gate = Gate(engine)
    engine.submit(request("r", 'start: "given up"'))
    event = engine.abort("r")
    assert event is not None
    assert event.finish_reason is FinishReason.ABORT
    assert engine.idle
    assert engine.abort("r") is None
    gate.open()


def test_an_engine_without_a_vocabulary_refuses_grammars(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(RequestRejected):
        engine.submit(request("r", DIGITS))
    assert engine.idle


# --- think blocks in the engine ---

POLICY = ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, closing=CLOSING, forbid_eos=True)


def test_a_block_that_never_closes_runs_to_its_length(engine: Engine) -> None:
    never = ((CLOSE, -100.0), (EOS, 100.0))
    (events,) = run(engine, request("r", DIGITS, POLICY, logit_bias=never)).values()
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert len(events) == 120


@pytest.mark.parametrize("cap", [0, 7])
def test_after_a_forced_close_the_answer_follows_the_grammar(engine: Engine, cap: int) -> None:
    never = ((CLOSE, -100.0),)
    think = replace(POLICY, cap=cap)
    (events,) = run(engine, request("r", DIGITS, think, logit_bias=never)).values()
    tokens = answer_tokens(events)
    assert tokens[cap : cap + 3] == list(CLOSING)
    assert TOKENIZER.decode(tokens[cap + 3 :])[0] == "{"
    assert events[-1].finish_reason is FinishReason.COMPLETE


def test_after_a_block_that_the_model_closes_the_answer_follows_the_grammar(engine: Engine) -> None:
    """The bias makes the model close its block at once, and then write line breaks."""
    bias = ((CLOSE, 200.0), (BREAKS, 90.0))
    (events,) = run(engine, request("r", DIGITS, POLICY, logit_bias=bias, temperature=0)).values()
    tokens = answer_tokens(events)
    assert tokens.count(BREAKS) == 1
    close = tokens.index(CLOSE)
    assert tokens[close + 1] == BREAKS
    assert TOKENIZER.decode(tokens[close + 2 :])[0] == "{"


def test_a_model_may_open_a_block_before_its_answer(engine: Engine) -> None:
    think = replace(POLICY, opened_by_prompt=False, cap=3)
    bias = ((OPEN, 100.0),)
    (events,) = run(engine, request("r", DIGITS, think, logit_bias=bias)).values()
    tokens = answer_tokens(events)
    assert tokens[:7] == [OPEN, OPEN, OPEN, OPEN, *CLOSING]
    assert TOKENIZER.decode(tokens[7:])[0] == "{"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_does_not_make_a_model_open_a_block(engine: Engine, temperature: float) -> None:
    """An Instruct model prefers a letter, which the grammar forbids.

    The opening tag was likelier than `{`, and the model reasoned until its context was full.
    """
    bias = ((LETTER, 100.0), (OPEN, 50.0), (CLOSE, -100.0))
    think = replace(POLICY, opened_by_prompt=False)
    (events,) = run(
        engine, request("r", DIGITS, think, logit_bias=bias, temperature=temperature)
    ).values()
    assert OPEN not in answer_tokens(events)
    assert events[-1].finish_reason is FinishReason.COMPLETE


@FEW_EXAMPLES
@given(st.booleans(), st.none() | st.integers(0, 9), st.integers(0, 2**31))
def test_after_any_block_the_answer_follows_the_grammar(
    engine: Engine, opened: bool, cap: int | None, seed: int
) -> None:
    tag_bias = random.Random(seed).choice([0.0, 6.0, 9.0])
    fields: dict[str, Any] = {"logit_bias": ((OPEN, tag_bias), (CLOSE, tag_bias)), "seed": seed}
    fields["max_tokens"] = 60
    think = replace(POLICY, opened_by_prompt=opened, cap=cap)
    (events,) = run(engine, request("r", DIGITS, think, temperature=2.0, **fields)).values()
    tokens = answer_tokens(events)
    if not opened and tokens[0] != OPEN:
        answer = tokens
    elif CLOSE in tokens:
        answer = tokens[tokens.index(CLOSE) + 1 :]
    else:
        assert events[-1].finish_reason is FinishReason.LENGTH
        return
    text = TOKENIZER.decode(answer, skip_special_tokens=False).removeprefix("\n\n")
    complete = events[-1].finish_reason is not FinishReason.LENGTH
    assert re.fullmatch(r"\{\d{1,3}\}" if complete else r"(\{\d{0,3})?", text)
