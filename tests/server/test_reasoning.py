"""The rule "where reasoning ends": examples first, then properties over any cutting."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.reasoning import THINK_CLOSE, THINK_OPEN, TOOL_CALL, ReasoningSplitter

TEXTS = st.lists(
    st.sampled_from([THINK_OPEN, THINK_CLOSE, TOOL_CALL, "<think", "</", ">", "\n", " ", "a", "é"]),
    max_size=12,
).map("".join)


@dataclass
class Parts:
    reasoning: str = ""
    content: str = ""
    repeated: bool = False


def split(pieces: list[str], *, opened: bool, by_length: bool = False) -> Parts:
    machine = ReasoningSplitter.of_prompt(opened=opened, closing=(THINK_CLOSE, TOOL_CALL))
    parts = Parts()
    for piece in [*(machine.feed(piece) for piece in pieces), machine.finish(by_length=by_length)]:
        parts.reasoning += piece.reasoning
        parts.content += piece.content
        parts.repeated |= piece.repeats_reasoning
    return parts


def cuttings(text: str) -> st.SearchStrategy[list[str]]:
    """The text, cut anywhere."""
    places = st.sets(st.integers(0, len(text)), max_size=8).map(sorted)
    return places.map(
        lambda at: [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]
    )


CUT_TEXTS = TEXTS.flatmap(cuttings)


def test_a_block_the_model_opened_is_reasoning_and_the_rest_content() -> None:
    parts = split(["<think>\na=6\n</think>\n\nAnswer: 6"], opened=False)
    assert parts == Parts("a=6", "Answer: 6")


def test_whitespace_may_stand_before_the_block() -> None:
    assert split(["\n <think>x</think>y"], opened=False) == Parts("x", "y")


def test_a_block_the_prompt_opened_needs_no_tag() -> None:
    assert split(["a=6\n</think>\n\nAnswer: 6"], opened=True) == Parts("a=6", "Answer: 6")


def test_text_without_a_block_is_content_to_the_last_space() -> None:
    assert split([" Answer: 6 \n"], opened=False) == Parts("", " Answer: 6 \n")


def test_tags_behind_the_beginning_are_plain_text() -> None:
    text = "Use <think> and </think> so."
    assert split([text], opened=False) == Parts("", text)


def test_a_second_closing_tag_is_plain_text() -> None:
    assert split(["a</think>b</think>c"], opened=True) == Parts("a", "b</think>c")


def test_an_opening_tag_inside_the_block_is_plain_text() -> None:
    assert split(["<think>a<think>b</think>c"], opened=False) == Parts("a<think>b", "c")


def test_a_tool_call_tag_closes_an_open_block() -> None:
    assert split(["a<tool_call>b"], opened=True) == Parts("a", "b")


@pytest.mark.parametrize("opened", [True, False])
def test_a_block_cut_by_length_is_reasoning_and_content_is_empty(opened: bool) -> None:
    text = "a=6\nb=" if opened else "<think>\na=6\nb="
    assert split([text], opened=opened, by_length=True) == Parts("a=6\nb=", "")


def test_a_cut_inside_the_closing_tag_loses_nothing() -> None:
    assert split(["a\n</thi"], opened=True, by_length=True) == Parts("a\n</thi", "")


def test_a_block_never_closed_by_an_answer_that_ended_itself_was_the_answer() -> None:
    assert split(["Answer: ", "6\n"], opened=True) == Parts("Answer: 6", "Answer: 6\n", True)


def test_a_lone_beginning_of_the_opening_tag_is_content() -> None:
    assert split(["<thi"], opened=False) == Parts("", "<thi")


def test_a_model_without_tags_has_content_only() -> None:
    machine = ReasoningSplitter.without_tags()
    assert machine.feed("<think>a</think>").content == "<think>a</think>"


@given(CUT_TEXTS, st.booleans(), st.booleans())
def test_any_cutting_gives_the_same_as_the_whole(
    pieces: list[str], opened: bool, by_length: bool
) -> None:
    whole = split(["".join(pieces)], opened=opened, by_length=by_length)
    cut = split(pieces, opened=opened, by_length=by_length)
    letters = split(list("".join(pieces)), opened=opened, by_length=by_length)
    # What was streamed as reasoning before the end is the one thing cutting may change, where
    # the block turned out to be the answer: there it does not count.
    if whole.repeated:
        whole.reasoning = cut.reasoning = letters.reasoning = ""
    assert cut == letters == whole


@given(TEXTS, st.booleans(), st.booleans())
def test_nothing_is_lost_and_nothing_said_twice(text: str, opened: bool, by_length: bool) -> None:
    parts = split([text], opened=opened, by_length=by_length)
    said = parts.content if parts.repeated else parts.reasoning + parts.content
    assert without_tags_and_breaks(said) == without_tags_and_breaks(text)


@given(CUT_TEXTS)
def test_an_answer_is_never_hidden(pieces: list[str]) -> None:
    """However it was cut: where the answer ended by itself, only a closed block is reasoning."""
    parts = split(pieces, opened=True)
    text = "".join(pieces)
    if THINK_CLOSE not in text and TOOL_CALL not in text:
        assert parts.content == text.lstrip("\n")


def without_tags_and_breaks(text: str) -> str:
    for tag in (THINK_OPEN, THINK_CLOSE, TOOL_CALL):
        text = text.replace(tag, "")
    return "".join(text.split())
