"""Grades answers: a grader reads the answer in a text, and decides whether it is correct.

A grader gets the text of an answer without the reasoning. What it reads is also what votes count.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from typing import Any, Final, Protocol

from mi_runtime.embedded_pair.task import extract_answer
from server.sweep.errors import BadParameters, missing_library
from server.sweep.tasks import EMBEDDED, Question


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader read in an answer, and whether it is correct."""

    reading: str | None  # None: the text holds no answer in the grader's form
    correct: bool


class Grader(Protocol):
    """Grades the answers to questions whose correct answers have one form."""

    @property
    def votes(self) -> bool:
        """Whether equal answers have equal readings, so that a majority is meaningful."""

    def check(self, question: Question) -> None:
        """Raises `BadParameters` if the question's answer is not in this grader's form."""

    def grade(self, question: Question, text: str) -> Grade:
        """Returns the grade of `text` as an answer to the question."""


@dataclass(frozen=True, slots=True)
class ByReading:
    """Reads one short text in an answer, in a form in which equal answers are equal texts."""

    read: Callable[[str], str | None]
    expected: Callable[[Any], str | None]
    form: str
    votes: bool = True

    def check(self, question: Question) -> None:
        if self.expected(question.answer) is None:
            raise BadParameters(f"question {question.id!r}: `answer` must be {self.form}")

    def grade(self, question: Question, text: str) -> Grade:
        reading = self.read(text)
        correct = reading is not None and reading == self.expected(question.answer)
        return Grade(reading, correct)


def grader_named(name: str, pattern: str | None = None) -> Grader:
    """Returns the grader of that name.

    Raises `BadParameters` for an unknown name, a bad pattern or a library that is missing.
    """
    if name == "regex":
        if pattern is None:
            raise BadParameters("--grader regex requires --pattern")
        return _by_pattern(pattern)
    if pattern is not None:
        raise BadParameters("--pattern is allowed only with --grader regex")
    if name not in _GRADERS:
        raise BadParameters(f"no grader {name!r}; there are {', '.join(GRADERS)}")
    return _GRADERS[name]()


def _stripped(text: str) -> str | None:
    return text.strip() or None


def _text(answer: Any) -> str | None:
    return _stripped(answer) if isinstance(answer, str) else None


_NUMBER: Final = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")


def last_number(text: str) -> str | None:
    """Returns the last number, without thousands separators and trailing zeros: `1,200.50` gives
    `1200.5`."""
    numbers = _NUMBER.findall(text)
    return _plain_number(numbers[-1]) if numbers else None


def _plain_number(text: str) -> str | None:
    try:
        value = Decimal(text.strip().replace(",", "").replace("−", "-"))
    except InvalidOperation:
        return None
    if not value.is_finite():
        return None
    return "0" if value == 0 else format(value.normalize(), "f")


def _number(answer: Any) -> str | None:
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        return None
    return _plain_number(str(answer))


_CHOICES: Final = (
    re.compile(r"\\boxed\{\s*(?:\\(?:text|mathrm|textbf)\{)?\s*\(?([A-Z])\)?\s*\}"),
    re.compile(r"(?i:\banswer\b)\W{0,6}(?i:is|:)?\W{0,6}\b([A-Z])\b"),
    re.compile(r"\A\W*([A-Z])\b(?:[.):]|\W*\Z)"),
    re.compile(r"\b([A-Z])\W*\Z"),
)
"""Where the letter of a multiple choice may be, the most reliable place first."""


def chosen_letter(text: str) -> str | None:
    """Returns the last boxed letter, or the last after "answer", or the text's first or last."""
    for place in _CHOICES:
        letters = place.findall(text)
        if letters:
            return str(letters[-1])
    return None


def _letter(answer: Any) -> str | None:
    return answer if isinstance(answer, str) and re.fullmatch("[A-Z]", answer) else None


def _by_pattern(pattern: str) -> Grader:
    """Returns a grader that reads the last match, or its first group if the pattern has any."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise BadParameters(f"--pattern {pattern!r}: {error}") from None

    def read(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        return matches[-1][1 if compiled.groups else 0] if matches else None

    return ByReading(read, _text, "the text that the pattern finds")


def _digit(text: str) -> str | None:
    number = extract_answer(text)
    return None if number is None else str(number)


class Boxed:
    """Compares the content of the last `\\boxed{}` mathematically, with math-verify."""

    votes = True

    def __init__(self) -> None:
        if find_spec("math_verify") is None:
            raise missing_library("math-verify", "measure")

    def check(self, question: Question) -> None:
        if not isinstance(question.answer, str | int) or not self._parsed(question.answer):
            raise BadParameters(
                f"question {question.id!r}: `answer` must be a number or LaTeX, without a box"
            )

    def grade(self, question: Question, text: str) -> Grade:
        from math_verify import LatexExtractionConfig, parse, verify

        _, box, last = text.rpartition("\\boxed")
        if not box:
            return Grade(None, False)
        boxes = LatexExtractionConfig(boxed_match_priority=0)
        # Several boxes in one text would be read as one.
        found = parse(box + last, extraction_config=[boxes])
        if not found:
            return Grade(None, False)
        return Grade(str(found[0]), bool(verify(self._parsed(question.answer), found)))

    def _parsed(self, answer: str | int) -> list[Any]:
        from math_verify import parse

        found: list[Any] = parse(f"\\boxed{{{answer}}}")
        return found


class Instructions:
    """Runs IFEval's strict checks, with if-verifiable: every instruction must be followed.

    `answer` is {"instruction_id_list": [...], "kwargs": [{...}, ...]}, as in the data set.
    """

    votes = False

    def __init__(self) -> None:
        if find_spec("if_verifiable") is None:
            raise missing_library("if-verifiable", "ifeval")

    def check(self, question: Question) -> None:
        answer = question.answer
        if not isinstance(answer, Mapping) or not answer.get("instruction_id_list"):
            raise BadParameters(
                f"question {question.id!r}: `answer` must have `instruction_id_list` and `kwargs`"
            )
        known = self._registry()
        unknown = [name for name in answer["instruction_id_list"] if name not in known]
        if unknown:
            raise BadParameters(f"question {question.id!r}: no check named {unknown[0]!r}")
        self._evaluate(question, "text")  # finds bad arguments before the run

    def grade(self, question: Question, text: str) -> Grade:
        reading = _stripped(text)
        return Grade(reading, reading is not None and self._evaluate(question, reading))

    def _evaluate(self, question: Question, text: str) -> bool:
        from if_verifiable.common import evaluate_instructions

        answer = question.answer
        try:
            _, scores = evaluate_instructions(
                response=text,
                instruction_id_list=answer["instruction_id_list"],
                kwargs_list=answer.get("kwargs") or [{}] * len(answer["instruction_id_list"]),
                prompt=str(question.messages[-1]["content"]),
                instruction_registry=self._registry(),
            )
        except (TypeError, ValueError, LookupError) as error:
            raise BadParameters(f"question {question.id!r}: {str(error).strip()[:300]}") from error
        return bool(scores.binary_strict == 1.0)

    def _registry(self) -> Mapping[str, Any]:
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

        registry: Mapping[str, Any] = INSTRUCTION_DICT
        return registry


_GRADERS: Final[Mapping[str, Callable[[], Grader]]] = {
    EMBEDDED: lambda: ByReading(_digit, _text, "the digit, as text"),
    "exact": lambda: ByReading(_stripped, _text, "a text"),
    "numeric": lambda: ByReading(last_number, _number, "a number"),
    "choice": lambda: ByReading(chosen_letter, _letter, "one capital letter"),
    "boxed": Boxed,
    "instructions": Instructions,
}
GRADERS: Final = (*_GRADERS, "regex")
