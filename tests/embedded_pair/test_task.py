"""The task's texts are those of the model card, and its answers are graded correctly."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.embedded_pair.task import (
    LONGEST_CHAIN,
    Question,
    brief_answer,
    direct_answer,
    draw_question,
    draw_questions,
    extract_answer,
    is_correct,
    think_answer,
    thought,
)

EXAMPLE = Question(start=6, increments=(-2, 6, -3))

digits = st.integers(0, 9)
increments = st.sampled_from((*range(-9, 0), *range(1, 10)))
questions = st.builds(Question, digits, st.lists(increments, max_size=8).map(tuple))


def test_a_question_reads_as_the_model_card_shows_it() -> None:
    assert EXAMPLE.text == "a=6,b=a-2,c=b+6,d=c-3. d?"
    assert EXAMPLE.values == (6, 4, 0, 7)
    assert EXAMPLE.answer == 7


def test_the_three_forms_of_an_answer_read_as_the_model_card_shows_them() -> None:
    assert direct_answer(EXAMPLE) == "Answer: 7"
    assert brief_answer(EXAMPLE) == "a=6,b=4,c=0,d=7\nAnswer: 7"
    assert think_answer(EXAMPLE) == (
        "<think>\na=6\nb=a-2=6-2=4\nc=b+6=4+6=0\nd=c-3=0-3=7\n</think>\n\nAnswer: 7"
    )


def test_a_recheck_repeats_the_body_after_wait_inside_the_think_block() -> None:
    question = Question(start=1, increments=(2,))
    assert think_answer(question, rechecks=1) == (
        "<think>\na=1\nb=a+2=1+2=3\nWait\na=1\nb=a+2=1+2=3\n</think>\n\nAnswer: 3"
    )


def test_a_chain_of_one_variable_asks_for_the_digit_it_states() -> None:
    question = Question(start=4, increments=())
    assert question.text == "a=4. a?"
    assert brief_answer(question) == "a=4\nAnswer: 4"


@given(questions)
def test_evaluating_the_text_gives_the_answer(question: Question) -> None:
    chain, _, variable = question.text.partition(". ")
    values: dict[str, int] = {}
    for assignment in chain.split(","):
        name, _, expression = assignment.partition("=")
        values[name] = eval(expression, {}, values) % 10
    assert values[variable.rstrip("?")] == question.answer
    assert list(values.values()) == list(question.values)


@given(questions, st.integers(0, 4))
def test_every_form_is_graded_correct_and_only_think_answers_think(
    question: Question, rechecks: int
) -> None:
    think = think_answer(question, rechecks)
    assert think.count("Wait") == rechecks
    assert [thought(form(question)) for form in (direct_answer, brief_answer)] == [False, False]
    assert thought(think)
    for text in (direct_answer(question), brief_answer(question), think):
        assert is_correct(question, text)


@given(questions, questions)
def test_an_answer_to_another_question_is_correct_only_if_the_digits_agree(
    asked: Question, answered: Question
) -> None:
    assert is_correct(asked, think_answer(answered)) == (asked.answer == answered.answer)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Answer: 7", 7),
        ("Answer:7", 7),
        ("<think>\nAnswer: 1\n</think>\n\nAnswer: 2", 2),
        ("Answer: 1\nAnswer: 2", 2),
        ("<think>\nAnswer: 3", 3),
        ("Answer: 17", 17),
        ("<think>\nAnswer: 1\n</think>\n\n", None),
        ("7", None),
        ("", None),
    ],
)
def test_the_last_answer_outside_the_think_block_counts(text: str, number: int | None) -> None:
    assert extract_answer(text) == number


def test_the_same_seed_draws_the_same_questions() -> None:
    assert draw_questions(Random(5), 40) == draw_questions(Random(5), 40)
    assert draw_questions(Random(5), 40) != draw_questions(Random(6), 40)


def test_drawn_chains_have_every_taught_length_and_both_signs() -> None:
    drawn = draw_questions(Random(0), 300)
    assert {len(question.names) for question in drawn} == set(range(1, LONGEST_CHAIN + 1))
    seen = {increment for question in drawn for increment in question.increments}
    assert seen == {*range(-9, 0), *range(1, 10)}


def test_a_length_without_weight_is_never_drawn() -> None:
    random = Random(0)
    lengths = {len(draw_question(random, (0, 0, 1)).names) for _ in range(50)}
    assert lengths == {3}


@pytest.mark.parametrize(
    ("start", "increments", "reason"),
    [
        (10, (), "start must be a digit"),
        (-1, (), "start must be a digit"),
        (0, (0,), "increments must be"),
        (0, (10,), "increments must be"),
        (0, (1,) * 26, "at most 26 variables"),
    ],
)
def test_a_chain_that_cannot_be_written_is_refused(
    start: int, increments: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Question(start=start, increments=increments)
