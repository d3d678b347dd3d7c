"""Lists what the GPU bench measures, at which sizes, and in which order. No torch.

A *subject* is what is measured, a *case* one row of it, and a *job* a case of a subject.
Subjects of one group share a process and run one after another. The jobs of a group begin with the
first row of each subject, so a run that is cut short can compare all of them. Then the other jobs
follow, those of the last subject first, because it is in memory already. A subject that comes back
is started again and measures its first row again; the two rows show how much the card itself
drifts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

from bench.models.shapes import SHAPES, TINY, Shape, Store

Row = dict[str, Any]  # a row as it is written
Subject = Literal["card", "static", "pair", "int8", "int4", "batching", "generate"]
What = Literal["start", "decode", "prefill", "first token", "answers"]
Lambdas = Literal["one", "different", "never seen", "instruct", "thinking"]
SUBJECTS: Final[tuple[Subject, ...]] = get_args(Subject)
GROUPS: Final[tuple[tuple[Subject, ...], ...]] = (
    ("card", "static", "pair"),
    ("int8", "int4"),
    ("batching",),
    ("generate",),
)
STORES: Final[tuple[Store, ...]] = get_args(Store)
OUT_OF_TIME: Final = "out of time"
NOT_STARTED: Final = "its subject did not start"
DEVICE_LOST: Final = 75  # exit code of a process that lost its device, after its last row


LONGEST_ERROR: Final = 500  # characters of an error in a row


class Skipped(Exception):
    """A row cannot be measured on this machine or in this run; the message says why."""


def message_of(error: Exception) -> str:
    """Returns the message of an error, as a row stores it."""
    return f"{type(error).__name__}: {error}"[:LONGEST_ERROR]


@dataclass(frozen=True, slots=True)
class Case:
    """What one row measures. `tokens` is the length of each sequence's context or prompt."""

    what: What
    lambdas: Lambdas = "one"
    sequences: int = 0
    tokens: int = 0


START: Final = Case("start")


@dataclass(frozen=True, slots=True)
class Job:
    subject: Subject
    case: Case = START

    def row(self, **values: Any) -> Row:
        """Returns the row with these values."""
        return {"subject": self.subject, **asdict(self.case), **values}


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes of the rows. Of several sizes, the first is the most important."""

    decodes: tuple[tuple[int, int], ...] = (  # sequences, and tokens of context of each
        (32, 1024),
        (1, 1024),
        (128, 1024),
        (32, 8192),
        (1, 8192),
    )
    prefill: tuple[int, int] = (8, 2048)  # sequences, and tokens of each
    prompts: tuple[int, ...] = (1024, 64)  # tokens of the prompt whose first token is timed
    answers: tuple[int, int, int] = (32, 1024, 128)  # sequences, tokens of prompt and of answer
    warm: int = 12  # steps before the rounds of a decode row
    rounds: int = 5
    steps: int = 32  # at most, in a round
    seconds: float = 1.0  # seconds for all rounds of a decode row

    @property
    def batch(self) -> int:
        """Largest number of sequences of a decode row."""
        return max(sequences for sequences, _ in self.decodes)

    @property
    def context(self) -> int:
        return max(tokens for _, tokens in self.decodes)


FULL: Final = Scale()
SMALL: Final = Scale(
    decodes=((2, 16), (1, 16), (2, 48)),
    prefill=(2, 24),
    prompts=(8,),
    answers=(32, 8, 4),
    warm=3,
    rounds=2,
    steps=2,
    seconds=0.01,
)


@dataclass(frozen=True, slots=True)
class Run:
    """The model that is measured, and how."""

    model: str
    smoke: bool = False
    compiled: bool = False  # whether captured steps are compiled

    @property
    def shape(self) -> Shape:
        return (TINY if self.smoke else SHAPES)[self.model]

    @property
    def scale(self) -> Scale:
        return SMALL if self.smoke else FULL


def off(engine: Mapping[str, Any], run: Run, device: str) -> Row:
    """Returns the error of an engine that lacks something that speed depends on, else nothing.

    On a CPU there is never an error, because an engine there has neither CUDA graphs nor kernels.
    """
    found = what_is_off(engine, run) if device == "cuda" else []
    return {"error": "; ".join(found)} if found else {}


def what_is_off(engine: Mapping[str, Any], run: Run) -> list[str]:
    """Returns what the engine lacks.

    `engine` is what it reports of its attention, its CUDA graphs and its pair products.
    """
    attention, graphs, kernels = (
        str(engine[fact]) for fact in ("attention", "graphs", "pair_kernels")
    )
    found = []
    if graphs.startswith("none"):
        found.append(f"no CUDA graphs were captured: {graphs}")
    elif run.compiled and "compiled" not in graphs.partition(",")[0]:
        found.append(f"captured decode steps are not compiled: {graphs}")
    if attention.startswith(("reference", "none")):
        found.append(f"attention has no kernels: {attention}")
    # Tiny matrices may be faster without kernels.
    if kernels.startswith(("none", "off")) or (kernels.startswith("up to 0 ") and not run.smoke):
        found.append(f"pair products have no kernels: {kernels}")
    return found


def jobs_of(subjects: Sequence[Subject], scale: Scale) -> list[Job]:
    """Returns the jobs of subjects that share a process."""
    *others, last = subjects
    jobs = [job for subject in others for job in _jobs(subject, scale)[:2]]
    jobs += _jobs(last, scale)
    for subject in reversed(others):
        again = _jobs(subject, scale)
        jobs += again if len(again) > 2 else []
    return jobs


def _jobs(subject: Subject, scale: Scale) -> list[Job]:
    return [Job(subject), *(Job(subject, case) for case in cases_of(subject, scale))]


def cases_of(subject: Subject, scale: Scale) -> list[Case]:
    """Returns the cases of a subject in order of importance."""
    sequences, prompt, _ = scale.answers
    decodes = [Case("decode", "one", *size) for size in scale.decodes]
    answers, prefill = (
        Case("answers", "one", sequences, prompt),
        Case("prefill", "one", *scale.prefill),
    )
    match subject:
        case "card":
            return []
        case "static":
            return [decodes[0], answers, prefill, *decodes[1:]]
        case "pair":
            return _pair_cases(scale, decodes, answers, prefill)
        case "int8" | "int4":
            several = _each(decodes[1:], ["different"])
            ends = _each(decodes[:1], ["different", "instruct"])
            return ends + _each([answers, prefill], ["different"]) + several
        case "batching":
            return [answers]
        case "generate":
            batches = dict.fromkeys(batch for batch, _ in scale.decodes)
            return [Case("decode", "one", batch, prompt) for batch in batches]


def _pair_cases(scale: Scale, decodes: list[Case], answers: Case, prefill: Case) -> list[Case]:
    first, *others = [Case("first token", "never seen", 1, length) for length in scale.prompts]
    cases = _each(decodes[:1], ["different", "one", "instruct", "thinking"])
    cases += [first, *_each([answers, prefill, *decodes[1:]], ["one", "different"])]
    return cases + others


def _each(cases: Iterable[Case], kinds: list[Lambdas]) -> list[Case]:
    """Returns each case with each kind of λ. A single sequence cannot have different ones."""
    return [
        Case(case.what, kind, case.sequences, case.tokens)
        for case in cases
        for kind in kinds
        if case.sequences > 1 or kind != "different"
    ]
