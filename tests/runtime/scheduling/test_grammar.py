"""Answers under a grammar: the state alone, then an engine whose random model says anything.

The oracle is the `jsonschema` package: whatever is drawn, at any temperature, in any batch, must be
an instance of the schema.
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
    RequestRejected,
    SamplingParams,
    ThinkPolicy,
    TokenEvent,
)
from mi_runtime.scheduling.grammar import MOST_KEPT, Grammars, GrammarState
from mi_runtime.scheduling.thinking import Phase, ThinkingState
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
    """Without white space to spend tokens on."""
    options = {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> GrammarVocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return GrammarVocabulary(str(path), (EOS,))


@pytest.fixture(scope="session")
def grammars(vocabulary: GrammarVocabulary) -> Grammars:
    return Grammars(vocabulary)


def thinking(*, opened: bool = False, cap: int | None = None) -> ThinkingState:
    policy = ThinkPolicy(OPEN, CLOSE, opened, cap, CLOSING, forbid_eos=True)
    blanks = frozenset({BREAK, BREAKS, *encode(" ")})
    return ThinkingState(policy, TokenMarks(blanks=blanks))


def tell(state: GrammarState, block: ThinkingState | None, tokens: Sequence[int]) -> None:
    for token_id in tokens:
        state.observe(token_id)
        if block is not None:
            block.observe(token_id)


def allowed(state: GrammarState) -> set[int]:
    mask = state.mask()
    ids = {index for index in range(len(mask) * 8) if mask[index // 8] >> index % 8 & 1}
    return ids | ({state.extra_token} - {None})  # type: ignore[arg-type]


# --- the state alone ---


def test_without_a_think_block_the_grammar_holds_from_the_first_token(grammars: Grammars) -> None:
    state = grammars.state(DIGITS, None)
    assert state.constrains
    assert allowed(state) == set(encode("{"))
    tell(state, None, encode("{4"))
    assert allowed(state) == set(encode("0123456789}"))


def test_an_open_block_is_free_and_its_tokens_are_none_of_the_answer(grammars: Grammars) -> None:
    block = thinking(opened=True)
    state = grammars.state(DIGITS, block)
    for token_id in [LETTER, *encode("}"), BREAK]:
        assert not state.constrains
        tell(state, block, [token_id])
    assert state.failure is None
    tell(state, block, [CLOSE])
    assert state.constrains


def test_before_anything_is_said_a_block_may_open_instead(grammars: Grammars) -> None:
    block = thinking()
    state = grammars.state(DIGITS, block)
    assert allowed(state) == {*encode("{"), OPEN}
    tell(state, block, [OPEN, LETTER, CLOSE])
    assert (block.phase, state.failure) == (Phase.CLOSED, None)
    assert allowed(state) == {*encode("{"), BREAKS}


def test_once_the_answer_began_no_block_opens(grammars: Grammars) -> None:
    block = thinking()
    state = grammars.state(DIGITS, block)
    tell(state, block, encode("{"))
    assert OPEN not in allowed(state)


def test_behind_its_own_tag_the_model_may_write_the_closing_sequences_breaks_once(
    grammars: Grammars,
) -> None:
    block = thinking(opened=True)
    state = grammars.state(DIGITS, block)
    tell(state, block, [CLOSE, BREAKS])
    assert allowed(state) == set(encode("{"))
    tell(state, block, encode("{4}"))
    assert state.complete


def test_the_forced_closing_sequence_is_none_of_the_answer(grammars: Grammars) -> None:
    block = thinking(opened=True, cap=1)
    state = grammars.state(DIGITS, block)
    tell(state, block, [LETTER])
    for token_id in CLOSING:
        assert not state.constrains
        assert block.forced_token == token_id
        tell(state, block, [token_id])
    assert state.constrains
    assert allowed(state) == set(encode("{"))  # the line breaks are written


def test_an_end_is_allowed_where_the_answer_is_complete_and_not_before(grammars: Grammars) -> None:
    state = grammars.state("start: /[0-9]{1,3}/", None)
    assert EOS not in allowed(state)
    tell(state, None, encode("4"))
    assert EOS in allowed(state)
    assert not state.complete
    tell(state, None, encode("25"))
    assert state.complete
    assert allowed(state) == {EOS}


def test_a_token_against_the_grammar_is_a_failure_and_not_an_end(grammars: Grammars) -> None:
    state = grammars.state(DIGITS, None)
    tell(state, None, [LETTER])
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


def test_where_the_library_is_not_installed_a_grammar_is_a_failure_that_names_it(
    vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    state = Grammars(vocabulary).state(DIGITS, None)
    assert state.mask() == b""
    assert "llguidance" in (state.failure or "")


def test_sequences_of_one_grammar_do_not_move_each_other(grammars: Grammars) -> None:
    one, other = grammars.state(DIGITS, None), grammars.state(DIGITS, None)
    tell(one, None, encode("{12"))
    assert allowed(other) == set(encode("{"))


def test_grammars_that_were_pushed_out_are_compiled_again(vocabulary: GrammarVocabulary) -> None:
    grammars = Grammars(vocabulary)
    states = [grammars.state(f'start: "{n}"', None) for n in range(MOST_KEPT + 2)]
    again = grammars.state('start: "0"', None)
    assert allowed(states[0]) == allowed(again) == set(encode("0"))


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=3), st.integers(1, 99))
def test_bits_of_masks_say_what_is_forbidden(masks: list[bytes], vocabulary: int) -> None:
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


def said(events: list[TokenEvent]) -> list[int]:
    ended = events[-1].finish_reason is FinishReason.STOP
    tokens = [event.token_id for event in events[: -1 if ended else None]]
    return [token_id for token_id in tokens if token_id is not None]


def text_of(events: list[TokenEvent]) -> str:
    return str(TOKENIZER.decode(said(events), skip_special_tokens=False))


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
def test_whatever_schema_the_answer_validates(
    engine: Engine, schema: dict[str, Any], temperature: float, seed: int
) -> None:
    fields: dict[str, Any] = {"temperature": temperature, "max_tokens": 100, "seed": seed}
    (events,) = run(engine, request("r", json_grammar(schema), **fields)).values()
    if events[-1].finish_reason is not FinishReason.LENGTH:
        jsonschema.validate(json.loads(text_of(events)), schema)


def test_rows_with_and_without_a_grammar_share_a_batch_and_do_not_notice(engine: Engine) -> None:
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
        assert said(together[one.request_id]) == said(alone), one.request_id


def test_preemption_does_not_move_the_grammar(
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
        assert said(answers[one.request_id]) == said(alone)


def test_the_last_token_of_a_complete_answer_ends_it_without_an_end_token(engine: Engine) -> None:
    (events,) = run(engine, request("r", DIGITS)).values()
    assert events[-1].finish_reason is FinishReason.COMPLETE
    assert events[-1].token_id == encode("}")[0]


@pytest.mark.parametrize("params", [{"min_tokens": 50}, {"ignore_eos": True}])
def test_a_complete_answer_ends_though_ends_are_forbidden(
    engine: Engine, params: dict[str, Any]
) -> None:
    (events,) = run(engine, request("r", DIGITS, **params)).values()
    assert events[-1].finish_reason is FinishReason.COMPLETE


def test_where_an_end_is_ignored_the_answer_is_as_long_as_the_grammar_lets_it(
    engine: Engine,
) -> None:
    fields: dict[str, Any] = {"ignore_eos": True, "temperature": 1.0}
    (events,) = run(engine, request("r", "start: /[0-9]{1,9}/", **fields)).values()
    assert len(said(events)) == 9


def test_an_answer_that_may_neither_end_nor_go_on_is_complete(engine: Engine) -> None:
    """The grammar wants a token that is a stop token, and those are forbidden for now."""
    brace = encode("}")[0]
    fields: dict[str, Any] = {"stop_token_ids": frozenset({brace}), "min_tokens": 50}
    (events,) = run(engine, request("r", 'start: "{4}"', **fields)).values()
    assert (events[-1].token_id, events[-1].finish_reason) == (None, FinishReason.COMPLETE)
    assert text_of(events) == "{4"


def test_a_stop_token_ends_an_answer_before_it_is_complete(engine: Engine) -> None:
    fields: dict[str, Any] = {"stop_token_ids": frozenset(encode("4"))}
    (events,) = run(engine, request("r", 'start: "{4}"', **fields)).values()
    assert events[-1].finish_reason is FinishReason.STOP


def test_a_bias_cannot_push_a_token_past_the_grammar(engine: Engine) -> None:
    fields: dict[str, Any] = {"logit_bias": ((LETTER, 100.0),), "logprobs": 0}
    (events,) = run(engine, request("r", DIGITS, **fields)).values()
    assert LETTER not in said(events)


def test_logprobs_are_the_models_own(engine: Engine) -> None:
    """Under the grammar one token is certain; the model thinks little of it."""
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
    """Holds back the thread that compiles until it is opened."""

    def __init__(self, engine: Engine) -> None:
        self._open = threading.Event()
        assert engine._grammars is not None
        engine._grammars._thread.submit(self._open.wait)

    def open(self) -> None:
        self._open.set()


def test_nobody_waits_for_the_grammar_of_another(engine: Engine) -> None:
    gate = Gate(engine)
    engine.submit(request("held", 'start: "held"'))
    assert engine.stats().waiting == 1
    free = run_until_ended(engine, request("free", None, max_tokens=5))
    assert len(free) == 5
    assert not engine.idle
    gate.open()
    assert until_ended(engine, "held")[-1].finish_reason is FinishReason.COMPLETE
    assert engine.idle


def test_an_engine_that_waits_for_a_grammar_alone_still_takes_requests(engine: Engine) -> None:
    """It used to wait as long as the grammar took, behind all those that were given up before it:
    nobody could come in, and nobody could give up."""
    gate = Gate(engine)
    engine.submit(request("held", 'start: "held alone"'))
    assert engine.step() == []
    assert len(run_until_ended(engine, request("free", None, max_tokens=5))) == 5
    assert engine.abort("held") is not None
    assert engine.idle
    gate.open()


def run_until_ended(engine: Engine, one: EngineRequest) -> list[TokenEvent]:
    engine.submit(one)
    return until_ended(engine, one.request_id)


def until_ended(engine: Engine, request_id: str) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        events += engine.step()
    assert {event.request_id for event in events} == {request_id}
    return events


def test_a_request_may_be_given_up_while_its_grammar_compiles(engine: Engine) -> None:
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
def test_behind_a_forced_close_the_answer_obeys(engine: Engine, cap: int) -> None:
    never = ((CLOSE, -100.0),)
    think = replace(POLICY, cap=cap)
    (events,) = run(engine, request("r", DIGITS, think, logit_bias=never)).values()
    tokens = said(events)
    assert tokens[cap : cap + 3] == list(CLOSING)
    assert TOKENIZER.decode(tokens[cap + 3 :])[0] == "{"
    assert events[-1].finish_reason is FinishReason.COMPLETE


def test_behind_a_block_the_model_closes_the_answer_obeys(engine: Engine) -> None:
    """Led to close its block at once, and to write line breaks without end."""
    led = ((CLOSE, 200.0), (BREAKS, 90.0))
    (events,) = run(engine, request("r", DIGITS, POLICY, logit_bias=led, temperature=0)).values()
    tokens = said(events)
    assert tokens.count(BREAKS) == 1
    close = tokens.index(CLOSE)
    assert tokens[close + 1] == BREAKS
    assert TOKENIZER.decode(tokens[close + 2 :])[0] == "{"


def test_a_model_that_wants_to_think_may_open_a_block_before_its_answer(engine: Engine) -> None:
    think = replace(POLICY, opened_by_prompt=False, cap=3)
    led = ((OPEN, 100.0),)
    (events,) = run(engine, request("r", DIGITS, think, logit_bias=led)).values()
    tokens = said(events)
    assert tokens[:7] == [OPEN, OPEN, OPEN, OPEN, *CLOSING]
    assert TOKENIZER.decode(tokens[7:])[0] == "{"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_makes_no_model_think_that_would_not(engine: Engine, temperature: float) -> None:
    """An Instruct model wants to write a letter. Of what was left, `{` and the opening tag, the tag
    was the likelier: it thought, badly, until its context was full."""
    led = ((LETTER, 100.0), (OPEN, 50.0), (CLOSE, -100.0))
    think = replace(POLICY, opened_by_prompt=False)
    (events,) = run(
        engine, request("r", DIGITS, think, logit_bias=led, temperature=temperature)
    ).values()
    assert OPEN not in said(events)
    assert events[-1].finish_reason is FinishReason.COMPLETE


@FEW_EXAMPLES
@given(st.booleans(), st.none() | st.integers(0, 9), st.integers(0, 2**31))
def test_whatever_the_block_does_the_answer_behind_it_obeys(
    engine: Engine, opened: bool, cap: int | None, seed: int
) -> None:
    leaning = random.Random(seed).choice([0.0, 6.0, 9.0])
    fields: dict[str, Any] = {"logit_bias": ((OPEN, leaning), (CLOSE, leaning)), "seed": seed}
    fields["max_tokens"] = 60
    think = replace(POLICY, opened_by_prompt=opened, cap=cap)
    (events,) = run(engine, request("r", DIGITS, think, temperature=2.0, **fields)).values()
    tokens = said(events)
    if not opened and tokens[0] != OPEN:
        answer = tokens
    elif CLOSE in tokens:
        answer = tokens[tokens.index(CLOSE) + 1 :]
    else:
        assert events[-1].finish_reason is FinishReason.LENGTH
        return
    text = TOKENIZER.decode(answer, skip_special_tokens=False).removeprefix("\n\n")
    whole = events[-1].finish_reason is not FinishReason.LENGTH
    assert re.fullmatch(r"\{\d{1,3}\}" if whole else r"(\{\d{0,3})?", text)
