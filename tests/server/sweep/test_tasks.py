"""Questions come from the embedded task or from a file, whose bad lines are named."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from server.sweep.errors import BadParameters
from server.sweep.tasks import embedded_task, read_task


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_the_embedded_task_is_the_same_for_the_same_seed() -> None:
    assert embedded_task(40, 3) == embedded_task(40, 3)
    assert embedded_task(40, 3).digest != embedded_task(40, 4).digest
    assert len(embedded_task(None, 0).questions) == 150


def test_chains_of_up_to_two_variables_are_short() -> None:
    task = embedded_task(200, 0)
    assert task.classes == ["long", "short"]
    for question in task.questions:
        variables = question.messages[0]["content"].count("=")
        assert (question.kind == "short") == (variables <= 2)
    assert min(Counter(question.kind for question in task.questions).values()) > 40


def test_a_line_of_a_file_has_a_question_or_a_conversation(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 + 3?"}]
    path = write_lines(
        tmp_path / "sums.jsonl",
        {"question": "2 + 2?", "answer": "4", "class": "short", "id": "sum"},
        "",
        {"messages": turns, "answer": 6},
    )
    task = read_task(path, None)
    first, second = task.questions
    assert task.name == "sums.jsonl"
    assert (first.id, first.kind, first.answer) == ("sum", "short", "4")
    assert first.messages == ({"role": "user", "content": "2 + 2?"},)
    assert (second.id, second.kind, list(second.messages)) == ("3", "default", turns)
    assert task.classes == ["short"]


def test_a_count_takes_the_first_questions_and_needs_that_many(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "q.jsonl", *({"question": str(n), "answer": str(n)} for n in range(5))
    )
    assert [it.answer for it in read_task(path, 2).questions] == ["0", "1"]
    with pytest.raises(BadParameters, match="5 questions, but 6 are needed"):
        read_task(path, 6)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "q.jsonl:2: Invalid JSON"),
        ({"question": "x"}, "q.jsonl:2: answer: Field required"),
        ({"answer": "x"}, "q.jsonl:2: give one of `question` and `messages`"),
        ({"question": "x", "messages": [], "answer": "x"}, "q.jsonl:2: give one of `question` and"),
        ({"question": "x", "answer": "x", "klass": "a"}, "q.jsonl:2: klass: Extra inputs"),
        ({"question": "x", "answer": "x", "class": "Not so"}, "q.jsonl:2: class: String should"),
        ({"question": "x", "answer": "x", "id": "1"}, "two questions have the id '1'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, reason: str) -> None:
    path = write_lines(tmp_path / "q.jsonl", {"question": "x", "answer": "x"}, line)
    with pytest.raises(BadParameters, match=reason):
        read_task(path, None)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadParameters, match="0 questions"):
        read_task(write_lines(tmp_path / "q.jsonl"), None)
    with pytest.raises(BadParameters, match="No such file"):
        read_task(tmp_path / "none.jsonl", None)
