"""An answer ends before its first stop string, wherever the text is cut."""

from hypothesis import given
from hypothesis import strategies as st

from server.text.stop_strings import StopStrings

STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=0, max_size=4)


def cut_at_stop(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """Returns the text up to a stop string, and whether there was one."""
    stop_strings = StopStrings(stops)
    text = ""
    for piece in pieces:
        text += stop_strings.feed(piece)
        if stop_strings.hit:
            return text, True
    return text + stop_strings.finish(), False


def test_the_text_ends_before_the_stop_string() -> None:
    assert cut_at_stop(["Answer: 7\n", "\nmore"], ["\n\n"]) == ("Answer: 7", True)


def test_text_that_only_begins_a_stop_string_is_shown() -> None:
    assert cut_at_stop(["a\n", "b"], ["\n\n"]) == ("a\nb", False)


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided() -> None:
    stop_strings = StopStrings(["END"])
    assert stop_strings.feed("abcE") == "abc"
    assert stop_strings.feed("N") == ""
    assert stop_strings.feed("!") == "EN!"


@given(st.lists(st.text("ab\n", max_size=4), max_size=10), STOPS)
def test_the_text_is_the_same_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    assert (
        cut_at_stop(pieces, stops)
        == cut_at_stop(list("".join(pieces)), stops)
        == cut_at_stop(["".join(pieces)], stops)
    )


@given(st.lists(st.text("ab\n", max_size=4), max_size=10), STOPS)
def test_the_text_contains_no_stop_string_and_misses_nothing_before_it(
    pieces: list[str], stops: list[str]
) -> None:
    complete = "".join(pieces)
    text, hit = cut_at_stop(pieces, stops)
    assert complete.startswith(text)
    assert not any(stop in text for stop in stops)
    assert hit or text == complete
