"""Tool calls are read from an answer's text, however it is cut, and everything else is content."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.tool_parser import ToolCallDelta, ToolCallParser, join_deltas

Call = tuple[str, str]  # name, arguments


def parse(*pieces: str) -> tuple[str, list[Call]]:
    """Returns the content and the calls of an answer that arrives in these pieces."""
    content, deltas = parse_deltas(*pieces)
    functions: list[Any] = [call["function"] for call in join_deltas(deltas)]
    return content, [(it["name"], it["arguments"]) for it in functions]


def parse_deltas(*pieces: str) -> tuple[str, list[ToolCallDelta]]:
    """Returns the content and the deltas of all calls, numbered `call_0`, `call_1`, …"""
    numbers = itertools.count()
    calls = ToolCallParser(make_id=lambda: f"call_{next(numbers)}")
    parsed = [calls.feed(piece) for piece in pieces]
    parsed.append(calls.finish())
    deltas = [delta for one in parsed for delta in one.calls]
    assert calls.count == len({delta.index for delta in deltas})
    return "".join(one.content for one in parsed), deltas


def call_text(name: str, arguments: str) -> str:
    """Returns a call as a model writes it."""
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


def test_text_without_a_call_is_content_with_all_its_whitespace() -> None:
    assert parse(" a <tool \n") == (" a <tool \n", [])


def test_a_call_has_a_name_and_arguments_as_they_were_written() -> None:
    assert parse(call_text("add", '{"a":  1}')) == ("", [("add", '{"a":  1}')])


def test_content_is_before_between_and_after_calls_without_the_white_space_around_them() -> None:
    text = f"Wait.\n\n{call_text('f', '{}')}\n{call_text('g', '{}')}\n So \n"
    assert parse(text) == ("Wait.So \n", [("f", "{}"), ("g", "{}")])


def test_the_first_delta_names_the_call_and_the_arguments_follow_as_they_come() -> None:
    text = call_text("f", '{"a": 1}')
    _, deltas = parse_deltas(*text)
    assert deltas[0] == ToolCallDelta(0, "", "f", "call_0")
    assert [delta.arguments for delta in deltas[1:]] == list('{"a": 1}')


def test_calls_are_numbered() -> None:
    _, deltas = parse_deltas(call_text("f", "{}") + call_text("g", "{}"))
    assert [(delta.index, delta.id) for delta in deltas if delta.id] == [
        (0, "call_0"),
        (1, "call_1"),
    ]


@pytest.mark.parametrize(
    "arguments",
    ['{"a": "}</tool_call>\\""}', '{"a": {"b": [{}, "]"]}}', '{"a": "<tool_call>"}', "{}"],
)
def test_brackets_and_tags_inside_strings_do_not_end_a_call(arguments: str) -> None:
    assert parse(call_text("f", arguments)) == ("", [("f", arguments)])


@pytest.mark.parametrize(
    "body",
    [
        '{"arguments": {"a": 1}, "name": "f"}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"id": 7, "name": "f", "arguments": {"a": 1}}',
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", ""])
def test_a_call_in_another_order_is_read_when_it_is_complete(body: str, end: str) -> None:
    assert parse(f"<tool_call>{body}{end}") == ("", [("f", '{"a": 1}')])


@pytest.mark.parametrize("end", ["}\n</tool_call>", "\n</tool_call>", "}", "}\n</tool", ""])
def test_a_call_without_its_complete_end_is_a_call(end: str) -> None:
    assert parse(f'<tool_call>{{"name": "f", "arguments": {{}}{end}') == ("", [("f", "{}")])


def test_arguments_that_were_cut_off_are_given_as_far_as_they_came() -> None:
    assert parse('<tool_call>{"name": "f", "arguments": {"a": "b') == ("", [("f", '{"a": "b')])


def test_arguments_end_at_a_closing_tag_even_if_they_are_incomplete() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1\n</tool_call>so'
    assert parse(text) == ("so", [("f", '{"a": 1\n')])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call> \n",
        "Write <tool_call> for a call.",
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\q", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 1}</tool_call>',
        '<tool_call>{"name": "f", "argu',
        "<tool_call>[]</tool_call>",
        "</tool_call>",
        "a\n<tool_call>{b}</tool_call>\n",
    ],
)
def test_text_that_is_no_call_stays_content(text: str) -> None:
    assert parse(text) == (text, [])
    assert parse(*text) == (text, [])


def test_a_call_after_text_that_looked_like_one_is_a_call() -> None:
    text = "<tool_call>oops " + call_text("f", "{}")
    assert parse(text) == ("<tool_call>oops", [("f", "{}")])


# --- properties ---

PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool_call>\n{", '{"name": "f", "arguments": {'),
        *('{"name": "f", "arguments": ', '"name"', '"arguments"', '"f"', ":", ",", "{", "}", "}}"),
        *("[", "]", '"', "\\", "<", "</tool", " ", "\n", "a", "é", "1"),
    ]
)
TEXTS = st.lists(PIECES, max_size=14).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("</tool_call>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
CALLS = st.tuples(
    st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True),
    st.dictionaries(st.text(max_size=4), VALUES, max_size=3),
)


def cut_anywhere(data: st.DataObject, text: str) -> list[str]:
    at = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    return [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]


@given(TEXTS, st.data())
def test_calls_and_content_are_the_same_however_the_text_is_cut(
    text: str, data: st.DataObject
) -> None:
    complete = parse(text)
    assert parse(*cut_anywhere(data, text)) == complete
    assert parse(*text) == complete


@given(st.lists(CALLS, max_size=3), st.booleans(), st.data())
def test_every_call_that_was_written_is_read(
    calls: list[tuple[str, Any]], readable: bool, data: st.DataObject
) -> None:
    wanted = [(name, json.dumps(it, ensure_ascii=readable)) for name, it in calls]
    text = "So:\n" + "\n".join(call_text(*call) for call in wanted)
    content, read = parse(*cut_anywhere(data, text))
    assert read == wanted
    assert content == ("So:" if calls else "So:\n")


@given(TEXTS)
def test_no_text_is_lost_and_none_is_repeated(text: str) -> None:
    """Every letter of the text is in the content, in a call, or in the syntax of a call."""
    content, calls = parse(text)
    if not calls:
        assert content == text
    parsed = content + "".join(name + arguments for name, arguments in calls)
    for letter in "é1":  # which are not in the syntax of a call
        assert parsed.count(letter) == text.count(letter)
