"""Each grader reads an answer in the form that it knows, and compares it with the right one."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.sweep.errors import BadParameters
from server.sweep.graders import GRADERS, Grade, chosen_letter, grader_named, last_number
from server.sweep.tasks import Question


def question(answer: object) -> Question:
    return Question("1", ({"role": "user", "content": "?"},), answer)


def grade(name: str, answer: object, text: str, pattern: str | None = None) -> Grade:
    grader = grader_named(name, pattern)
    grader.check(question(answer))
    return grader.grade(question(answer), text)


@pytest.mark.parametrize(
    ("name", "answer", "text", "reading", "correct"),
    [
        ("embedded", "7", "a=6,b=7\nAnswer: 7", "7", True),
        ("embedded", "7", "Answer: 17", "17", False),
        ("embedded", "7", "seven", None, False),
        ("exact", "Paris", " Paris\n", "Paris", True),
        ("exact", "Paris", "paris", "paris", False),
        ("exact", "Paris", "  ", None, False),
        ("numeric", "1200.5", "so it is 1,200.50.", "1200.5", True),
        ("numeric", -3, "first 4, then −3", "-3", True),
        ("numeric", 1e3, "1000", "1000", True),
        ("numeric", "0.1", "1/10", "10", False),
        ("numeric", 4, "four", None, False),
        ("choice", "C", "A is wrong. The answer is (C).", "C", True),
        ("choice", "C", "\\boxed{C}, not answer: B", "C", True),
        ("choice", "C", "\\boxed{\\text{B}}", "B", False),
        ("choice", "C", "no letter", None, False),
        ("boxed", "\\frac{1}{2}", "so \\boxed{0.5}", "1/2", True),
        ("boxed", 204, "first \\boxed{3}, at last \\boxed{204}.", "204", True),
        ("boxed", 204, "it is 204", None, False),
        ("boxed", "3", "\\boxed{4}", "4", False),
    ],
)
def test_a_grader_reads_an_answer_in_its_form_and_compares_it(
    name: str, answer: object, text: str, reading: str | None, correct: bool
) -> None:
    graded = grade(name, answer, text)
    assert graded.correct is correct
    assert (
        graded.reading is None
        if reading is None
        else graded.reading in (reading, "0.500000000000000")
    )


@pytest.mark.parametrize(
    ("pattern", "reading"), [(r"x=(\d+)", "3"), (r"x=\d+", "x=3"), (r"y=(\d+)", None)]
)
def test_a_regular_expression_reads_its_last_match(pattern: str, reading: str | None) -> None:
    assert grade("regex", "3", "x=2, x=3", pattern) == Grade(reading, reading == "3")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(D)", "D"),
        ("C) because", "C"),
        ("C. Because", "C"),
        ("Answer: **B**", "B"),
        ("answer is $B$", "B"),
        ("Answer: A. No, the answer is B", "B"),
        ("I choose option D.", "D"),
        ("Because of it.", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice_is_found_where_models_write_it(
    text: str, letter: str | None
) -> None:
    assert chosen_letter(text) == letter


@given(st.integers(-(10**12), 10**12), st.text())
def test_a_number_is_read_in_every_notation(value: int, before: str) -> None:
    for text in (f"{value}", f"{value:,}", f"{value}.00", f"{before} {value}."):
        assert last_number(text) == str(value)


@given(st.text())
def test_no_text_breaks_a_grader(text: str) -> None:
    for name, answer in (("embedded", "7"), ("exact", "7"), ("numeric", 7), ("choice", "A")):
        graded = grade(name, answer, text)
        assert not (graded.correct and graded.reading is None)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("embedded", 7),
        ("exact", ""),
        ("exact", 4),
        ("numeric", "four"),
        ("numeric", True),
        ("numeric", "nan"),
        ("choice", "AB"),
        ("choice", "a"),
        ("boxed", [1]),
        ("boxed", ""),
    ],
)
def test_a_reference_answer_that_the_grader_cannot_compare_is_refused_before_the_run(
    name: str, answer: object
) -> None:
    with pytest.raises(BadParameters, match="question '1'"):
        grader_named(name).check(question(answer))


@pytest.mark.parametrize(
    ("name", "pattern", "reason"),
    [
        ("guess", None, "no grader 'guess'"),
        ("regex", None, "--grader regex requires --pattern"),
        ("exact", "x", "--pattern is allowed only with --grader regex"),
        ("regex", "(", "--pattern '\\('"),
    ],
)
def test_an_unknown_grader_or_a_wrong_pattern_is_refused(
    name: str, pattern: str | None, reason: str
) -> None:
    with pytest.raises(BadParameters, match=reason):
        grader_named(name, pattern)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("boxed", "math_verify", "measure"), ("instructions", "if_verifiable", "ifeval")],
)
def test_a_missing_library_is_named_with_the_extra_that_installs_it(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.sweep.graders.find_spec", lambda found: None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadParameters, match=rf"pip install 'mi-server\[{extra}\]'"):
        grader_named(name)
    assert name in GRADERS


def test_instructions_are_checked_by_the_library() -> None:
    pytest.importorskip("if_verifiable", reason="the extra `ifeval` brings 400 MB")
    answer = {
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_bullet_lists"],
        "kwargs": [{"num_bullets": None}, {"num_bullets": 2}],
    }
    assert grade("instructions", answer, "* one\n* two").correct
    assert not grade("instructions", answer, "* one, and\n* two").correct
    assert not grade("instructions", answer, "* one").correct
    assert grade("instructions", answer, "") == Grade(None, False)
    assert not grader_named("instructions").votes
    with pytest.raises(BadParameters, match="no check named 'such:not'"):
        grade("instructions", {"instruction_id_list": ["such:not"], "kwargs": [{}]}, "x")
