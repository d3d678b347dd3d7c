"""Makes a task of questions, which it draws for the embedded pair or reads from a JSONL file.

    {"question": "2 + 2?", "answer": "4", "class": "short", "id": "sum-1"}
    {"messages": [{"role": "user", "content": "…"}], "answer": "4"}

It has the correct answers, in the form that the grader needs, but does not grade.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mi_runtime.embedded_pair.task import draw_questions
from server.routing.profiles import DEFAULT_CLASS, ClassName
from server.sweep.errors import BadParameters

EMBEDDED: Final = "embedded"
EMBEDDED_QUESTIONS: Final = 150
LONGEST_SHORT_CHAIN: Final = 2
"""Most variables in a chain of class `short`, which the Instruct endpoint answers without
thinking."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its correct answer, and the kind of work it is."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    answer: Any  # in the grader's form
    kind: str = DEFAULT_CLASS  # routing class; `default`: no particular one


@dataclass(frozen=True, slots=True)
class Task:
    """The questions of a measurement."""

    name: str
    questions: tuple[Question, ...]

    @property
    def classes(self) -> list[str]:
        """The routing classes besides the default one, to which all questions belong."""
        return sorted({question.kind for question in self.questions} - {DEFAULT_CLASS})

    @property
    def digest(self) -> str:
        """A digest of questions and answers, which is equal for equal questions in equal order."""
        content = [[it.id, list(it.messages), it.answer, it.kind] for it in self.questions]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def embedded_task(count: int | None, seed: int) -> Task:
    """Returns chains of 1 to 6 assignments, each length equally likely, as `short` or `long`."""
    drawn = draw_questions(Random(seed), EMBEDDED_QUESTIONS if count is None else count)
    questions = (
        Question(
            id=str(number),
            messages=({"role": "user", "content": chain.text},),
            answer=str(chain.answer),
            kind="short" if len(chain.names) <= LONGEST_SHORT_CHAIN else "long",
        )
        for number, chain in enumerate(drawn)
    )
    return Task(EMBEDDED, tuple(questions))


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | int | None = None
    question: str | None = None
    messages: list[dict[str, Any]] | None = None
    answer: Any
    kind: ClassName = Field(DEFAULT_CLASS, alias="class")


def read_task(path: Path, count: int | None) -> Task:
    """Returns the file's first `count` questions. Raises `BadParameters` that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadParameters(f"{path}: {error}") from None
    questions = list(_questions(path, lines))
    if len(questions) < (count or 1):
        raise BadParameters(f"{path}: {len(questions)} questions, but {count or 1} are needed")
    _check_ids(path, questions)
    questions = questions[:count]
    return Task(path.name, tuple(questions))


def _questions(path: Path, lines: Sequence[str]) -> Iterator[Question]:
    for number, text in enumerate(lines, start=1):
        if text.strip():
            yield _question(f"{path}:{number}", str(number), text)


def _question(where: str, number: str, text: str) -> Question:
    try:
        line = _Line.model_validate_json(text)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, detail["loc"]))
        raise BadParameters(f"{where}: {name + ': ' if name else ''}{detail['msg']}") from None
    if (line.question is None) == (line.messages is None):
        raise BadParameters(f"{where}: give one of `question` and `messages`")
    messages = line.messages or [{"role": "user", "content": line.question}]
    own_id = number if line.id is None else str(line.id)
    return Question(own_id, tuple(messages), line.answer, line.kind)


def _check_ids(path: Path, questions: Sequence[Question]) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise BadParameters(f"{path}: two questions have the id {question.id!r}")
        seen.add(question.id)
