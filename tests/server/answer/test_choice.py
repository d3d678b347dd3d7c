"""A choice turns token events into chunks, which together have the text of all tokens."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.embedded_pair.tokenizer import TURN_END, build_tokenizer
from mi_runtime.request import FinishReason, Phase, RequestRejected, TokenEvent, TokenLogprobs
from mi_runtime.scheduling.thinking import ThinkingState
from server.answer.choice import AnswerChunk, Choice
from server.answer.echo import Echo
from server.answer.logprobs import columns, completions_logprobs
from server.ops.metrics import Metrics
from server.text.reasoning_parser import PlainText, Split, Splitter
from server.text.stop_strings import StopStrings
from server.text.think_blocks import ThinkBlocks
from server.text.tool_parser import ToolCallParser, join_deltas
from server.text.vocabulary import IncrementalDetokenizer, Vocabulary
from server.wire.errors import InvalidRequest, RequestFailed

VOCABULARY = Vocabulary(build_tokenizer())
EOS = VOCABULARY.encode(TURN_END)[0]
TOKENS = st.lists(
    st.integers(0, VOCABULARY.size - 1)
    | st.sampled_from(VOCABULARY.encode("<think></think>\n\nab<"))
    | st.just(VOCABULARY.encode("🙂")[0]),
    max_size=20,
)
STOPS = st.lists(st.text("ab\n<", min_size=1, max_size=3), max_size=3)


BLOCKS = ThinkBlocks.of(VOCABULARY, closing="\n</think>\n\n", soft_window=None)


def splitter(opened: bool) -> Splitter:
    return BLOCKS.splitter(opened_by_prompt=opened)


def new_choice(
    opened: bool = False, stop: list[str] | None = None, *, tools: bool = False
) -> Choice:
    return Choice(
        0,
        vocabulary=VOCABULARY,
        splitter=splitter(opened),
        stop=stop or [],
        meter=Metrics("pair").meter(0.5, 1, time.perf_counter()),
        tools=tools,
        field_names={"prompt": "messages", "grammar": "tools"},
    )


def events_of(ids: list[int], *, opened: bool) -> list[TokenEvent]:
    """Returns the engine's events of these tokens and an end-of-sequence."""
    policy = BLOCKS.policy(opened_by_prompt=opened, cap=None)
    assert policy is not None
    engine, events = ThinkingState(policy, VOCABULARY.marks), []
    for token_id in [*ids, EOS]:
        engine.observe(token_id)
        event = TokenEvent("r", token_id, phase=int(engine.phase))
        events.append(event._replace(reasoning_tokens=engine.reasoning_tokens))
    events[-1] = events[-1]._replace(finish_reason=FinishReason.STOP)
    return events


def chunks_of(choice: Choice, ids: list[int], *, opened: bool = False) -> list[AnswerChunk]:
    """Returns the chunks of these tokens and an end-of-sequence, up to a stop string."""
    chunks = []
    for event in events_of(ids, opened=opened):
        chunk = choice.take(0.0, event)
        if chunk is not None:
            chunks.append(chunk)
        if choice.stopped_by_string:
            break
    return chunks


@given(TOKENS, STOPS, st.booleans())
def test_chunks_give_the_text_of_all_tokens_together(
    ids: list[int], stops: list[str], opened: bool
) -> None:
    expected, stop = split_of_all(ids, opened), StopStrings(stops)
    content = stop.feed(expected.content)
    content += "" if stop.hit else stop.finish()

    chunks = chunks_of(new_choice(opened, stops), ids, opened=opened)
    assert "".join(chunk.content for chunk in chunks) == content
    if not expected.repeats_reasoning and not stop.hit:
        assert "".join(chunk.reasoning for chunk in chunks) == expected.reasoning
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]


def split_of_all(ids: list[int], opened: bool) -> Split:
    """Returns the split of all tokens, before stop strings are searched for."""
    parser, text, split = splitter(opened), IncrementalDetokenizer(VOCABULARY), Split()
    *events, end = events_of(ids, opened=opened)
    for event, token_id in zip(events, ids, strict=True):
        split = split.then(parser.feed(text.feed(token_id), event))
    split = split.then(parser.feed(text.finish(), end))
    return split.then(parser.finish(by_length=False))


def test_an_answer_that_ends_with_the_closing_tag_has_reasoning_only() -> None:
    choice = new_choice(opened=True)
    *events, close, _ = events_of(VOCABULARY.encode("ab</think>"), opened=True)
    events.append(close._replace(finish_reason=FinishReason.STOP))
    chunks = [chunk for event in events if (chunk := choice.take(0.0, event))]
    assert "".join(chunk.reasoning for chunk in chunks) == "ab"
    assert "".join(chunk.content for chunk in chunks) == ""
    assert choice.reasoning_tokens == 2


def test_a_forced_close_is_reported_on_the_last_chunk() -> None:
    choice = new_choice(opened=True)
    events = [
        event._replace(forced_close=event.phase == Phase.CLOSED)
        for event in events_of(VOCABULARY.encode("a\n</think>\n\nb"), opened=True)
    ]
    chunks = [chunk for event in events if (chunk := choice.take(0.0, event))]
    assert [chunk.forced_close for chunk in chunks] == [False, False, True]
    assert [(chunk.reasoning, chunk.content) for chunk in chunks] == [
        ("a", ""),
        ("", "b"),
        ("", ""),
    ]


def test_the_end_of_sequence_is_counted_but_not_shown() -> None:
    choice = new_choice()
    chunks = chunks_of(choice, VOCABULARY.encode("ab"))
    assert "".join(chunk.content for chunk in chunks) == "ab"
    assert choice.completion_tokens == 3


def test_an_error_of_the_engine_is_raised() -> None:
    with pytest.raises(RequestFailed, match="no luck"):
        new_choice().take(0.0, TokenEvent("r", None, FinishReason.ERROR, error="no luck"))


@pytest.mark.parametrize(
    ("param", "code", "named"),
    [
        ("prompt", "context_length_exceeded", "messages"),
        ("grammar", "invalid_request_error", "tools"),
        ("logit_bias", "invalid_request_error", "logit_bias"),
        (None, "invalid_request_error", None),
    ],
)
def test_a_rejection_by_the_engine_is_a_bad_request_that_names_the_field(
    param: str | None, code: str, named: str | None
) -> None:
    own_code = code if code == "context_length_exceeded" else None
    rejected = RequestRejected("no", param=param, code=own_code)
    with pytest.raises(InvalidRequest, match="no") as caught:
        new_choice().take(0.0, TokenEvent("r", None, FinishReason.ERROR, error=rejected))
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, named, code)


def test_an_answer_that_its_grammar_completed_shows_its_last_token() -> None:
    choice = new_choice()
    (brace,) = VOCABULARY.encode("}")
    chunk = choice.take(0.0, TokenEvent("r", brace, FinishReason.COMPLETE))
    assert chunk is not None
    assert (chunk.content, chunk.finish_reason) == ("}", "stop")


def test_an_answer_may_be_complete_without_another_token() -> None:
    choice = new_choice()
    chunk = choice.take(0.0, TokenEvent("r", None, FinishReason.COMPLETE))
    assert chunk is not None
    assert (chunk.content, chunk.finish_reason) == ("", "stop")


def echoing_choice(text: str) -> Choice:
    return Choice(
        0,
        vocabulary=VOCABULARY,
        splitter=PlainText(),
        stop=[],
        meter=Metrics("pair").meter(0.5, 1, time.perf_counter()),
        write_logprobs=completions_logprobs(VOCABULARY),
        echo=Echo.of_tokens(VOCABULARY.encode(text), VOCABULARY),
    )


def test_an_echo_comes_once_at_the_start_of_the_first_chunk() -> None:
    chunks = chunks_of(echoing_choice("ab"), VOCABULARY.encode("cd"))
    assert [chunk.content for chunk in chunks] == ["abc", "d", ""]


def test_an_echo_is_written_even_if_no_token_follows() -> None:
    end = TokenEvent("r", None, FinishReason.LENGTH)
    chunk = echoing_choice("ab").take(0.0, end)
    assert chunk is not None
    assert (chunk.content, chunk.finish_reason) == ("ab", "length")


def test_an_echo_has_the_logprobs_of_its_tokens_before_those_of_the_answer() -> None:
    (letter,) = VOCABULARY.encode("c")
    scored = TokenLogprobs(-1.0, ())
    event = TokenEvent("r", letter, logprobs=TokenLogprobs(-2.0, ()), prompt_logprobs=(scored,))
    chunk = echoing_choice("ab").take(0.0, event)
    assert chunk is not None
    written = columns(chunk.logprobs)
    assert written["tokens"] == ["a", "b", "c"]
    assert written["token_logprobs"] == [None, -1.0, -2.0]
    assert written["text_offset"] == [0, 1, 2]


CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
WITH_CALLS = st.lists(st.sampled_from([CALL, "so", "\n", "<tool_call>", "é🙂", "{", CALL[:30]]))


@given(WITH_CALLS)
def test_calls_in_chunks_are_those_of_the_complete_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    chunks = chunks_of(new_choice(tools=True), VOCABULARY.encode(text))
    parser = ToolCallParser()
    expected = parser.feed(text).then(parser.finish())
    assert "".join(chunk.content for chunk in chunks) == expected.content
    read = join_deltas([delta for chunk in chunks for delta in chunk.calls])
    assert [it["function"] for it in read] == [it["function"] for it in join_deltas(expected.calls)]
    assert chunks[-1].finish_reason == ("tool_calls" if expected.calls else "stop")
