"""The task of the embedded pair: given a chain of assignments modulo 10, find the last variable.

    question   a=6,b=a-2,c=b+6,d=c-3. d?
    direct     Answer: 7
    brief      a=6,b=4,c=0,d=7
               Answer: 7
    think      <think>
               a=6
               b=a-2=6-2=4
               c=b+6=4+6=0
               d=c-3=0-3=7
               </think>

               Answer: 7

A re-check is a line `Wait` followed by the body again, inside the think block. This module handles
text only: no tokens, no torch. All randomness comes from the caller's `random.Random`.

Two choices make the task learnable by a model of a million parameters in minutes: variables are
named in order (random names would require learning look-ups, which this model fails to do), and
each think line repeats its operands side by side (without them modular addition is not learned).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import Final

MODULUS: Final = 10
LONGEST_CHAIN: Final = 6
"""The longest chain in the training data; longer questions are possible, but were not trained."""

THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"

_INCREMENTS: Final = range(1, MODULUS)
_INCREMENT_WEIGHTS: Final = tuple(1 / increment for increment in _INCREMENTS)
_ANSWER: Final = re.compile(r"Answer:\s*(\d+)")


@dataclass(frozen=True)
class Question:
    """A chain: the first variable's digit, then one signed increment for each further variable."""

    start: int
    increments: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.start < MODULUS:
            raise ValueError(f"start must be a digit, got {self.start}")
        if any(abs(increment) not in _INCREMENTS for increment in self.increments):
            raise ValueError(f"increments must be -9..-1 or 1..9, got {self.increments}")
        if len(self.increments) >= len(ascii_lowercase):
            raise ValueError(f"a chain has at most {len(ascii_lowercase)} variables")

    @property
    def names(self) -> str:
        """The variables, one letter each, in order."""
        return ascii_lowercase[: 1 + len(self.increments)]

    @property
    def values(self) -> tuple[int, ...]:
        """The digit of each variable."""
        values = [self.start]
        for increment in self.increments:
            values.append((values[-1] + increment) % MODULUS)
        return tuple(values)

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def text(self) -> str:
        """The text of the user message."""
        steps = zip(self.names, self.names[1:], self.increments, strict=False)
        chain = [f"a={self.start}", *(f"{new}={old}{by:+d}" for old, new, by in steps)]
        return f"{','.join(chain)}. {self.names[-1]}?"


def draw_question(random: Random, length_weights: Sequence[float]) -> Question:
    """Draws a chain of n variables with probability proportional to `length_weights[n - 1]`.

    An increment d has weight 1/d: with uniform weights, modular addition is not learned.
    """
    (length,) = random.choices(range(1, len(length_weights) + 1), length_weights)
    sizes = random.choices(_INCREMENTS, _INCREMENT_WEIGHTS, k=length - 1)
    return Question(
        start=random.randrange(MODULUS),
        increments=tuple(size * random.choice((1, -1)) for size in sizes),
    )


def draw_questions(random: Random, count: int, longest: int = LONGEST_CHAIN) -> list[Question]:
    """Draws `count` questions, every chain length from 1 to `longest` equally likely."""
    return [draw_question(random, [1.0] * longest) for _ in range(count)]


def direct_answer(question: Question) -> str:
    """Returns the answer alone."""
    return f"Answer: {question.answer}"


def brief_answer(question: Question) -> str:
    """Returns the values without the arithmetic, then the answer, without tags."""
    values = zip(question.names, question.values, strict=True)
    return ",".join(f"{name}={value}" for name, value in values) + "\n" + direct_answer(question)


def think_answer(question: Question, rechecks: int = 0) -> str:
    """Returns a think block that computes the chain 1 + `rechecks` times, then the answer."""
    body = "\nWait\n".join([_worked_chain(question)] * (1 + rechecks))
    return f"{THINK_OPEN}\n{body}\n{THINK_CLOSE}\n\n{direct_answer(question)}"


def _worked_chain(question: Question) -> str:
    names, values = question.names, question.values
    lines = [f"a={question.start}"]
    for index, increment in enumerate(question.increments):
        old, new = names[index], names[index + 1]
        worked = f"{values[index]}{increment:+d}={values[index + 1]}"
        lines.append(f"{new}={old}{increment:+d}={worked}")
    return "\n".join(lines)


def thought(answer_text: str) -> bool:
    """Whether the answer closes a think block (the paper's think rate counts exactly this)."""
    return THINK_CLOSE in answer_text


def extract_answer(answer_text: str) -> int | None:
    """Returns the number after the last `Answer:` outside the think block, or None.

    If the think block is never closed, the entire text is read, as in the paper's grading.
    """
    answer = answer_text.rpartition(THINK_CLOSE)[2]
    numbers = _ANSWER.findall(answer)
    return int(numbers[-1]) if numbers else None


def is_correct(question: Question, answer_text: str) -> bool:
    return extract_answer(answer_text) == question.answer
