"""Chunks of chat and text answers are written as events, equal to plain JSON of their content."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.request import Dial
from server.answer.answer import AnswerHead
from server.answer.chat_format import CHAT
from server.answer.choice import AnswerChunk
from server.answer.completions_format import COMPLETIONS
from server.answer.sse import ChunkWriter
from server.routing.routing_decision import RoutingDecision
from server.text.tool_parser import ToolCallDelta


def head(**fields: Any) -> AnswerHead:
    base: dict[str, Any] = {
        "id": "i",
        "created": 1,
        "model": 'pa"ir',
        "system_fingerprint": "fp_0",
        "decision": RoutingDecision((Dial(0.6),), "body"),
        "prompt_tokens": 3,
    }
    return AnswerHead(**base | fields)


def chat_writer(**fields: Any) -> ChunkWriter:
    return ChunkWriter(head(**fields), CHAT)


def read_events(written: bytes) -> list[dict[str, Any]]:
    """Returns the events of a stream, after checking that each is one line."""
    *events, rest = written.decode().split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def event(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {
        "id": "i",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": 'pa"ir',
        "system_fingerprint": "fp_0",
        "choices": [choice],
    }


ROUTING = {"routing": {"reasoning_lambda": 0.6, "source": "body"}}


def test_the_first_chunk_of_every_choice_has_the_role_and_the_routing() -> None:
    delta = {"role": "assistant", "content": ""}
    assert read_events(chat_writer().first(2)) == [
        event(delta, index=0) | ROUTING,
        event(delta, index=1) | ROUTING,
    ]


@given(st.text(), st.text())
def test_any_text_is_written_as_a_json_library_would(content: str, reasoning: str) -> None:
    written = read_events(chat_writer().write([AnswerChunk(1, content, reasoning)]))
    expected = []
    if reasoning:
        expected.append(event({"reasoning_content": reasoning, "reasoning": reasoning}, index=1))
    if content:
        expected.append(event({"content": content}, index=1))
    assert written == expected


def test_chunks_that_came_together_are_written_together() -> None:
    written = chat_writer().write([AnswerChunk(0, "a"), AnswerChunk(1, "b"), AnswerChunk(0, "c")])
    assert [it["choices"][0]["delta"]["content"] for it in read_events(written)] == ["a", "b", "c"]


def test_the_last_chunk_has_the_reason_and_the_routing() -> None:
    written = chat_writer().write([AnswerChunk(0, finish_reason="length")])
    assert read_events(written) == [event({}, "length") | ROUTING]


def test_with_usage_every_chunk_has_a_null_and_one_more_has_the_numbers() -> None:
    writer = chat_writer(include_usage=True)
    for written in (
        writer.first(1),
        writer.write([AnswerChunk(0, "a"), AnswerChunk(0, finish_reason="stop")]),
    ):
        assert all(it["usage"] is None for it in read_events(written))
    (last,) = read_events(writer.usage({"total_tokens": 5}, forced_close=False))
    assert (last["choices"], last["usage"]) == ([], {"total_tokens": 5})


def test_excluded_reasoning_is_left_out() -> None:
    writer = chat_writer(include_reasoning=False)
    assert writer.write([AnswerChunk(0, reasoning="r")]) == b""
    assert read_events(writer.write([AnswerChunk(0, "a", "r")])) == [event({"content": "a"})]


def test_a_call_is_written_after_the_content_one_event_a_piece() -> None:
    begun = ToolCallDelta(1, name="f", id="call_0")
    chunk = AnswerChunk(0, "a", finish_reason="tool_calls", calls=[begun, ToolCallDelta(1, "{}")])
    head_of_call = {"index": 1, "id": "call_0", "type": "function"}
    assert read_events(chat_writer().write([chunk])) == [
        event({"content": "a"}),
        event({"tool_calls": [head_of_call | {"function": {"name": "f", "arguments": ""}}]}),
        event({"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]}, "tool_calls")
        | ROUTING,
    ]


def test_text_answers_have_their_own_field_and_object_type() -> None:
    writer = ChunkWriter(head(), COMPLETIONS)
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
    (first,) = read_events(writer.first(1))
    assert (first["object"], first["choices"]) == ("text_completion", [choice])
    (middle, last) = read_events(
        writer.write([AnswerChunk(0, "a"), AnswerChunk(0, finish_reason="length")])
    )
    assert middle["choices"] == [choice | {"text": "a"}]
    assert last["choices"] == [choice | {"finish_reason": "length"}]
    assert "routing" in last


def test_line_separators_that_json_allows_are_escaped() -> None:
    assert b"\\u2028" in chat_writer().write([AnswerChunk(0, "\u2028")])


def test_logprobs_travel_with_their_chunk() -> None:
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    (written,) = read_events(
        chat_writer(logprobs=True).write([AnswerChunk(0, "a", logprobs=[entry])])
    )
    assert written["choices"][0]["logprobs"] == {"content": [entry]}


def test_a_forced_close_is_reported_with_the_last_chunk_and_the_usage() -> None:
    writer = chat_writer(include_usage=True)
    forced = {"routing": ROUTING["routing"] | {"forced_close": True}}
    (last,) = read_events(writer.write([AnswerChunk(0, finish_reason="stop", forced_close=True)]))
    (usage,) = read_events(writer.usage({}, forced_close=True))
    assert last["routing"] == usage["routing"] == forced["routing"]


def test_in_a_fan_out_first_and_last_chunk_of_a_choice_have_its_lambda() -> None:
    decision = RoutingDecision((Dial(0.2), Dial(1.0)), "body", fan_out=True)
    writer = chat_writer(decision=decision)
    first = read_events(writer.first(2))
    (middle,) = read_events(writer.write([AnswerChunk(1, "a")]))
    (last,) = read_events(writer.write([AnswerChunk(1, finish_reason="stop")]))
    assert [it["choices"][0]["reasoning_lambda"] for it in (*first, last)] == [0.2, 1.0, 1.0]
    assert "reasoning_lambda" not in middle["choices"][0]
    assert last["routing"]["reasoning_lambda"] == [0.2, 1.0]
