"""Tool calls in text: examples first, then properties over any text and any cutting of it."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.tool_parser import ToolCallDelta, ToolCallParser, join_deltas

Call = tuple[str, str]  # name, arguments


def parse(*pieces: str) -> tuple[str, list[Call]]:
    """Content and calls of an answer that comes in these pieces."""
    content, deltas = parse_deltas(*pieces)
    functions: list[Any] = [call["function"] for call in join_deltas(deltas)]
    return content, [(it["name"], it["arguments"]) for it in functions]


def parse_deltas(*pieces: str) -> tuple[str, list[ToolCallDelta]]:
    numbers = itertools.count()
    calls = ToolCallParser(make_id=lambda: f"call_{next(numbers)}")
    parsed = [calls.feed(piece) for piece in pieces]
    parsed.append(calls.finish())
    deltas = [delta for one in parsed for delta in one.calls]
    assert calls.count == len({delta.index for delta in deltas})
    return "".join(one.content for one in parsed), deltas


def written(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


def test_text_without_a_call_is_content_to_the_last_blank() -> None:
    assert parse(" a <tool \n") == (" a <tool \n", [])


def test_a_call_has_a_name_and_arguments_as_they_were_written() -> None:
    assert parse(written("add", '{"a":  1}')) == ("", [("add", '{"a":  1}')])


def test_content_is_before_between_and_after_calls_without_the_white_space_around_them() -> None:
    text = f"Wait.\n\n{written('f', '{}')}\n{written('g', '{}')}\n So \n"
    assert parse(text) == ("Wait.So \n", [("f", "{}"), ("g", "{}")])


def test_the_first_delta_names_the_call_and_the_arguments_follow_as_they_come() -> None:
    text = written("f", '{"a": 1}')
    _, deltas = parse_deltas(*text)
    assert deltas[0] == ToolCallDelta(0, "", "f", "call_0")
    assert [delta.arguments for delta in deltas[1:]] == list('{"a": 1}')


def test_calls_are_numbered() -> None:
    _, deltas = parse_deltas(written("f", "{}") + written("g", "{}"))
    assert [(delta.index, delta.id) for delta in deltas if delta.id] == [
        (0, "call_0"),
        (1, "call_1"),
    ]


@pytest.mark.parametrize(
    "arguments",
    ['{"a": "}</tool_call>\\""}', '{"a": {"b": [{}, "]"]}}', '{"a": "<tool_call>"}', "{}"],
)
def test_brackets_and_tags_in_strings_end_nothing(arguments: str) -> None:
    assert parse(written("f", arguments)) == ("", [("f", arguments)])


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
def test_a_call_whose_end_is_not_all_there_is_a_call(end: str) -> None:
    assert parse(f'<tool_call>{{"name": "f", "arguments": {{}}{end}') == ("", [("f", "{}")])


def test_arguments_that_were_cut_are_given_as_far_as_they_came() -> None:
    assert parse('<tool_call>{"name": "f", "arguments": {"a": "b') == ("", [("f", '{"a": "b')])


def test_arguments_that_a_tag_cuts_end_there() -> None:
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
def test_what_is_no_call_stays_content(text: str) -> None:
    assert parse(text) == (text, [])
    assert parse(*text) == (text, [])


def test_a_call_after_text_that_looked_like_one_is_a_call() -> None:
    text = "<tool_call>oops " + written("f", "{}")
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


def cut(data: st.DataObject, text: str) -> list[str]:
    at = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    return [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]


@given(TEXTS, st.data())
def test_any_cutting_gives_the_same_as_the_whole(text: str, data: st.DataObject) -> None:
    whole = parse(text)
    assert parse(*cut(data, text)) == whole
    assert parse(*text) == whole


@given(st.lists(CALLS, max_size=3), st.booleans(), st.data())
def test_every_call_that_was_written_is_read(
    calls: list[tuple[str, Any]], readable: bool, data: st.DataObject
) -> None:
    wanted = [(name, json.dumps(it, ensure_ascii=readable)) for name, it in calls]
    text = "So:\n" + "\n".join(written(*call) for call in wanted)
    content, read = parse(*cut(data, text))
    assert read == wanted
    assert content == ("So:" if calls else "So:\n")


@given(TEXTS)
def test_nothing_is_lost_and_nothing_said_twice(text: str) -> None:
    """Every letter of the text is content, or of a call, or belongs to a call's form."""
    content, calls = parse(text)
    if not calls:
        assert content == text
    parsed = content + "".join(name + arguments for name, arguments in calls)
    for letter in "é1":  # which the form of a call does not have
        assert parsed.count(letter) == text.count(letter)
