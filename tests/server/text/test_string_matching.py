"""The first of several strings is found in a text, and so is the unfinished beginning of one."""

from hypothesis import given
from hypothesis import strategies as st

from server.text.string_matching import Match, first_match, unfinished_length

WORDS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


def test_the_match_that_ends_first_wins() -> None:
    assert first_match("xabcd", ["abcd", "bc"]) == Match(2, 4)


def test_the_longer_of_two_matches_with_one_end_wins() -> None:
    assert first_match("xab", ["b", "ab"]) == Match(1, 3)


def test_without_a_match_the_result_is_none() -> None:
    assert first_match("abc", ["x", "cd"]) is None


@given(st.text("ab", max_size=12), WORDS)
def test_the_unfinished_length_is_that_of_the_longest_end_that_begins_a_needle(
    text: str, needles: list[str]
) -> None:
    ends = [text[start:] for start in range(len(text) + 1)]
    begins = [end for end in ends if any(it.startswith(end) and it != end for it in needles)]
    assert unfinished_length(text, needles) == max(len(end) for end in begins)
