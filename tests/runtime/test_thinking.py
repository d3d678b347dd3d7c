"""The think block by token ids: when it opens, when it closes, what counts as reasoning."""

from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.request import ThinkPolicy
from mi_runtime.thinking import Phase, ThinkingState

OPEN, CLOSE = 1, 2
WORDS = st.lists(st.integers(3, 9))


def after(tokens: list[int], *, opened_by_prompt: bool = False) -> ThinkingState:
    state = ThinkingState(ThinkPolicy(OPEN, CLOSE, opened_by_prompt))
    for token in tokens:
        state.observe(token)
    return state


def test_a_block_opened_by_the_prompt_counts_from_the_first_token() -> None:
    state = after([7, 8], opened_by_prompt=True)
    assert (state.phase, state.reasoning_tokens) == (Phase.INSIDE, 2)


def test_an_answer_without_tags_has_no_reasoning() -> None:
    state = after([7, 8])
    assert (state.phase, state.reasoning_tokens) == (Phase.OUTSIDE, 0)


def test_a_close_tag_that_closes_nothing_is_an_answer_token() -> None:
    assert after([7, CLOSE, 8]).phase is Phase.OUTSIDE
    assert after([CLOSE, OPEN, 8]).reasoning_tokens == 1


def test_an_open_tag_repeated_inside_the_block_is_not_reasoning() -> None:
    assert after([OPEN, 7], opened_by_prompt=True).reasoning_tokens == 1


def test_nothing_reopens_a_closed_block() -> None:
    state = after([7, CLOSE, OPEN, 8, CLOSE], opened_by_prompt=True)
    assert (state.phase, state.reasoning_tokens) == (Phase.CLOSED, 1)


@given(lead=WORDS, reasoning=WORDS, answer=st.lists(st.integers(1, 9)))
def test_the_reasoning_is_what_lies_between_the_tags(
    lead: list[int], reasoning: list[int], answer: list[int]
) -> None:
    state = after([*lead, OPEN, *reasoning, CLOSE, *answer])
    assert (state.phase, state.reasoning_tokens) == (Phase.CLOSED, len(reasoning))


@given(reasoning=WORDS, answer=st.lists(st.integers(1, 9)))
def test_a_tag_in_the_prompt_opens_the_same_block(reasoning: list[int], answer: list[int]) -> None:
    by_prompt = after([*reasoning, CLOSE, *answer], opened_by_prompt=True)
    by_answer = after([OPEN, *reasoning, CLOSE, *answer])
    assert by_prompt.phase is by_answer.phase
    assert by_prompt.reasoning_tokens == by_answer.reasoning_tokens
