"""An answer is split into reasoning and content where the think block ends, however it is cut."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.request import FinishReason, Phase, TokenEvent
from mi_runtime.scheduling.thinking import ThinkingState
from server.text.reasoning_parser import THINK_CLOSE, THINK_OPEN, TOOL_CALL, Split, TextSplitter
from server.text.think_blocks import ThinkBlocks
from server.text.vocabulary import IncrementalDetokenizer, Vocabulary
from tests.server.tag_tokens import tokenizer_with_tags

CLOSING = (THINK_CLOSE, TOOL_CALL)
PIECES = [THINK_OPEN, THINK_CLOSE, TOOL_CALL, "<think", "</", ">", "\n", " ", "\n\n", "a", "é", "."]


VOCABULARY = Vocabulary(tokenizer_with_tags(TOOL_CALL))
BLOCKS = ThinkBlocks.of(VOCABULARY, closing="\n</think>\n\n", soft_window=None)
IDS = {piece: VOCABULARY.encode(piece) for piece in PIECES}
TOKENS = st.lists(st.sampled_from(PIECES), max_size=12).map(
    lambda pieces: [token_id for piece in pieces for token_id in IDS[piece]]
)
ANY_TOKENS = TOKENS | st.lists(st.integers(0, VOCABULARY.size - 1), max_size=12)


@dataclass
class Parts:
    reasoning: str = ""
    content: str = ""
    repeated: bool = False


def parts_of(split: Split) -> Parts:
    return Parts(split.reasoning, split.content, split.repeats_reasoning)


def events_of(ids: list[int], *, opened: bool) -> list[TokenEvent]:
    """Returns the engine's events of an answer of these tokens."""
    policy = BLOCKS.policy(opened_by_prompt=opened, cap=None)
    assert policy is not None
    engine, events = ThinkingState(policy, VOCABULARY.marks), []
    for token_id in ids:
        engine.observe(token_id)
        events.append(TokenEvent("r", token_id, phase=int(engine.phase)))
    return events


def split_tokens(ids: list[int], *, opened: bool, by_length: bool = False) -> Parts:
    """Splits an answer token by token, as it arrives."""
    splitter, text = BLOCKS.splitter(opened_by_prompt=opened), IncrementalDetokenizer(VOCABULARY)
    split = Split()
    for event in events_of(ids, opened=opened):
        assert event.token_id is not None
        split = split.then(splitter.feed(text.feed(event.token_id), event))
    split = split.then(splitter.feed(text.finish()))
    return parts_of(split.then(splitter.finish(by_length=by_length)))


def split(text: str, *, opened: bool, by_length: bool = False) -> Parts:
    return split_tokens(VOCABULARY.encode(text), opened=opened, by_length=by_length)


# --- tags that are tokens ---


def test_a_block_the_model_opened_is_reasoning_and_the_rest_content() -> None:
    parts = split("<think>\na=6\n</think>\n\nAnswer: 6", opened=False)
    assert parts == Parts("a=6", "Answer: 6")


def test_whitespace_may_stand_before_the_block() -> None:
    assert split("\n <think>x</think>y", opened=False) == Parts("x", "y")


def test_a_block_the_prompt_opened_needs_no_tag() -> None:
    assert split("a=6\n</think>\n\nAnswer: 6", opened=True) == Parts("a=6", "Answer: 6")


def test_text_without_a_block_is_content_with_all_its_spaces() -> None:
    assert split(" Answer: 6 \n", opened=False) == Parts("", " Answer: 6 \n")


def test_whitespace_alone_is_content() -> None:
    assert split(" \n", opened=False) == Parts("", " \n")


def test_tags_after_the_first_text_are_plain_text() -> None:
    text = "Use <think> and </think> so."
    assert split(text, opened=False) == Parts("", text)


def test_a_second_closing_tag_is_plain_text() -> None:
    assert split("a</think>b</think>c", opened=True) == Parts("a", "b</think>c")


@pytest.mark.parametrize("between", ["", "\n\n", " \n \n"])
def test_a_closing_tag_repeated_at_once_is_dropped(between: str) -> None:
    """A model whose block the engine closed may write the tag again: it was shown as content."""
    text = f"a</think>{between}</think>\n\nb"
    assert split(text, opened=True) == split_text([text]) == Parts("a", "b")


def test_a_closing_tag_that_ends_the_answer_is_not_shown() -> None:
    """A tag that is a stop token arrives without text."""
    splitter = BLOCKS.splitter(opened_by_prompt=True)
    close, letter, end = events_of([*IDS[THINK_CLOSE], *IDS["a"], *IDS[THINK_CLOSE]], opened=True)
    splitter.feed("</think>", close)
    assert splitter.feed("b", letter) == Split(content="b")
    assert splitter.feed("", end) == Split()


def test_remaining_text_belongs_to_the_phase_of_the_last_event() -> None:
    splitter = BLOCKS.splitter(opened_by_prompt=True)
    assert splitter.feed("a") == Split(reasoning="a")
    splitter.feed("</think>", TokenEvent("r", *IDS[THINK_CLOSE], phase=Phase.CLOSED))
    assert splitter.feed("b") == Split(content="b")


def test_an_event_without_a_token_changes_nothing() -> None:
    splitter = BLOCKS.splitter(opened_by_prompt=True)
    end = TokenEvent("r", None, FinishReason.LENGTH, phase=Phase.INSIDE)
    assert splitter.feed("a", end) == Split(reasoning="a")
    assert splitter.inside_block


def test_only_one_repeated_closing_tag_is_dropped() -> None:
    text = "a</think>\n</think></think>b"
    assert split(text, opened=True) == split_text([text]) == Parts("a", "</think>b")


def test_whitespace_after_the_block_is_content_but_for_the_line_breaks_at_the_tag() -> None:
    for end in ("", "b"):
        text = f"a</think>\n \n{end}"
        assert split(text, opened=True) == split_text([text]) == Parts("a", f" \n{end}")


def test_an_opening_tag_inside_the_block_is_plain_text() -> None:
    assert split("<think>a<think>b</think>c", opened=False) == Parts("a<think>b", "c")


def test_a_tool_call_tag_closes_an_open_block() -> None:
    assert split("a<tool_call>b", opened=True) == Parts("a", "b")


def test_a_tag_that_the_model_spelled_is_plain_text() -> None:
    spelled = [token_id for letter in THINK_CLOSE for token_id in VOCABULARY.encode(letter)]
    ids = [*VOCABULARY.encode("a"), *spelled, *VOCABULARY.encode("b</think>c")]
    assert split_tokens(ids, opened=True) == Parts("a</think>b", "c")


@pytest.mark.parametrize("opened", [True, False])
def test_a_block_cut_by_length_is_reasoning_and_content_is_empty(opened: bool) -> None:
    text = "a=6\nb=" if opened else "<think>\na=6\nb="
    assert split(text, opened=opened, by_length=True) == Parts("a=6\nb=", "")


def test_a_block_that_a_finished_answer_never_closed_is_the_answer() -> None:
    assert split("Answer: 6\n", opened=True) == Parts("Answer: 6", "Answer: 6\n", True)


def slow_split(ids: list[int], *, opened: bool, by_length: bool) -> Parts:
    """Splits the complete answer at once, as a reference."""
    decode = VOCABULARY.tokenizer.decode
    tag_of = [VOCABULARY.tags.get(token_id) for token_id in ids]
    start = 0
    if not opened:
        whitespace = VOCABULARY.marks.whitespace
        assert whitespace is not None
        while start < len(ids) and ids[start] in whitespace:
            start += 1
        if start == len(ids) or tag_of[start] != THINK_OPEN:
            return Parts("", decode(ids))
        start += 1
    ends = [index for index in range(start, len(ids)) if tag_of[index] in CLOSING]
    if ends:
        reasoning, rest = decode(ids[start : ends[0]]), ends[0] + 1
        again = [index for index in range(rest, len(ids)) if tag_of[index] == THINK_CLOSE]
        if again and not decode(ids[rest : again[0]]).strip():
            rest = again[0] + 1
        content = decode(ids[rest:])
        return Parts(reasoning.strip("\n"), content.lstrip("\n"))
    text = decode(ids[start:]).lstrip("\n")
    return Parts(text, "") if by_length else Parts("", text, True)


@given(ANY_TOKENS, st.booleans(), st.booleans())
def test_token_by_token_the_split_is_that_of_the_complete_answer(
    ids: list[int], opened: bool, by_length: bool
) -> None:
    parts = split_tokens(ids, opened=opened, by_length=by_length)
    if parts.repeated:  # what was streamed as reasoning before the end does not count
        parts.reasoning = ""
    assert parts == slow_split(ids, opened=opened, by_length=by_length)


@given(ANY_TOKENS, st.booleans(), st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))
def test_the_splitter_follows_the_engine_through_a_forced_close(
    wanted: list[int], opened: bool, cap: int | None, window: int | None
) -> None:
    """Holds for any tokens of the model, and any cap and window of the engine."""
    blocks = ThinkBlocks.of(VOCABULARY, closing="\n</think>\n\n", soft_window=window)
    policy = blocks.policy(opened_by_prompt=opened, cap=cap)
    assert policy is not None
    engine = ThinkingState(policy, VOCABULARY.marks)
    splitter, text = blocks.splitter(opened_by_prompt=opened), IncrementalDetokenizer(VOCABULARY)
    split, forced = Split(), list[int]()
    for token_id in with_forced_tokens(engine, wanted, forced):
        event = TokenEvent("r", token_id, phase=int(engine.phase))
        split = split.then(splitter.feed(text.feed(token_id), event))
        assert splitter.inside_block == (engine.phase is Phase.INSIDE)
    if forced:
        assert forced == list(policy.closing)
        own_tags = sum(token_id == policy.close_id for token_id in wanted)
        assert (split.reasoning + split.content).count(THINK_CLOSE) <= own_tags
    if cap is not None:
        assert engine.reasoning_tokens <= cap


def with_forced_tokens(
    engine: ThinkingState, wanted: list[int], forced: list[int]
) -> Iterator[int]:
    """Yields the tokens that the model wants, with those that the engine forces among them.

    Appends the forced ones to `forced`.
    """
    for token_id in [*wanted, None]:
        while (must := engine.forced_token) is not None:
            forced.append(must)
            engine.observe(must)
            yield must
        if token_id is not None:
            engine.observe(token_id)
            yield token_id


# --- tags that are spelled ---

TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def split_text(pieces: list[str], *, by_length: bool = False) -> Parts:
    splitter = TextSplitter(opened=True, closing=CLOSING)
    split = Split()
    for piece in pieces:
        split = split.then(splitter.feed(piece))
    return parts_of(split.then(splitter.finish(by_length=by_length)))


def cuttings(text: str) -> st.SearchStrategy[list[str]]:
    """Returns a strategy of the text's pieces, cut anywhere."""
    places = st.sets(st.integers(0, len(text)), max_size=8).map(sorted)
    return places.map(
        lambda at: [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]
    )


CUT_TEXTS = TEXTS.flatmap(cuttings)


def test_a_spelled_tag_closes_the_prompts_block() -> None:
    assert split_text(["a=6\n</th", "ink>\n", "\nAnswer: 6"]) == Parts("a=6", "Answer: 6")


def test_a_cut_inside_the_closing_tag_loses_nothing() -> None:
    assert split_text(["a\n</thi"], by_length=True) == Parts("a\n</thi", "")


def test_a_model_without_tags_has_content_only() -> None:
    splitter = TextSplitter(opened=False, closing=CLOSING)
    assert splitter.feed("<think>a</think>").content == "<think>a</think>"
    assert splitter.finish(by_length=False) == Split()


@given(CUT_TEXTS, st.booleans())
def test_any_cutting_gives_the_same_split(pieces: list[str], by_length: bool) -> None:
    uncut = split_text(["".join(pieces)], by_length=by_length)
    cut = split_text(pieces, by_length=by_length)
    letters = split_text(list("".join(pieces)), by_length=by_length)
    # What was streamed as reasoning before the end is the one thing cutting may change, where
    # the block turned out to be the answer: there it does not count.
    if uncut.repeated:
        uncut.reasoning = cut.reasoning = letters.reasoning = ""
    assert cut == letters == uncut


@given(TEXTS, st.booleans())
def test_no_text_is_lost_and_none_is_repeated(text: str, by_length: bool) -> None:
    parts = split_text([text], by_length=by_length)
    shown = parts.content if parts.repeated else parts.reasoning + parts.content
    assert without_tags_and_breaks(shown) == without_tags_and_breaks(text)


@given(CUT_TEXTS, st.booleans())
def test_piece_by_piece_the_split_is_that_of_the_complete_text(
    pieces: list[str], by_length: bool
) -> None:
    parts, text = split_text(pieces, by_length=by_length), "".join(pieces)
    if parts.repeated:
        parts.reasoning = ""
    assert parts == slow_split_text(text, by_length=by_length)


def slow_split_text(text: str, *, by_length: bool) -> Parts:
    """Splits the complete text after a block that the prompt opened, as a reference."""
    end = re.search(f"{THINK_CLOSE}|{TOOL_CALL}", text)
    if end is not None:
        content = re.sub(rf"^\s*{THINK_CLOSE}", "", text[end.end() :])
        return Parts(text[: end.start()].strip("\n"), content.lstrip("\n"))
    text = text.lstrip("\n")
    return Parts(text, "") if by_length else Parts("", text, True)


@given(CUT_TEXTS)
def test_an_answer_is_never_hidden(pieces: list[str]) -> None:
    """If the answer ended by itself, only a closed block is reasoning."""
    parts = split_text(pieces)
    text = "".join(pieces)
    if THINK_CLOSE not in text and TOOL_CALL not in text:
        assert parts.content == text.lstrip("\n")


def without_tags_and_breaks(text: str) -> str:
    before = None
    while text != before:  # taking one tag out may make another of what was around it
        before = text
        for tag in (THINK_OPEN, THINK_CLOSE, TOOL_CALL):
            text = text.replace(tag, "")
    return "".join(text.split())
