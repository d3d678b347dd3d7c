from hypothesis import given
from hypothesis import strategies as st

from server.text.stop_strings import StopStrings

STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=0, max_size=4)


def cut(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    machine = StopStrings(stops)
    text = ""
    for piece in pieces:
        text += machine.feed(piece)
        if machine.hit:
            return text, True
    return text + machine.finish(), False


def test_the_text_ends_before_the_stop_string() -> None:
    assert cut(["Answer: 7\n", "\nmore"], ["\n\n"]) == ("Answer: 7", True)


def test_a_beginning_that_does_not_become_a_stop_string_is_given_out() -> None:
    assert cut(["a\n", "b"], ["\n\n"]) == ("a\nb", False)


def test_a_beginning_is_held_back_until_it_is_decided() -> None:
    machine = StopStrings(["END"])
    assert machine.feed("abcE") == "abc"
    assert machine.feed("N") == ""
    assert machine.feed("!") == "EN!"


@given(st.lists(st.text("ab\n", max_size=4), max_size=10), STOPS)
def test_any_cutting_gives_the_same_as_the_whole(pieces: list[str], stops: list[str]) -> None:
    assert cut(pieces, stops) == cut(list("".join(pieces)), stops) == cut(["".join(pieces)], stops)


@given(st.lists(st.text("ab\n", max_size=4), max_size=10), STOPS)
def test_no_text_holds_a_stop_string_and_none_is_lost(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    text, hit = cut(pieces, stops)
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    assert hit or text == whole
