"""The file of finished samples, `samples.jsonl`: the parameters, then one line for each sample.

Lines are only appended, and each is written before the next answer is counted: a killed run loses
only the requests in flight. The same command continues from the file; a command with other
parameters is refused, with the names of those that differ.
"""

import fcntl
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from server.sweep.errors import BadParameters

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer, graded."""

    setting: str  # the label of its setting
    question: str  # the id of its question
    sample: int
    correct: bool
    said: str | None  # what the grader read as the answer; None if it read none
    tokens: int  # generated, the end of the turn included
    reasoning_tokens: int
    thought: bool  # it closed a think block
    malformed: bool  # it ended by itself, without an answer or with a stray tag
    unfinished: bool  # it was cut by its length
    text: str  # what was graded

    @property
    def key(self) -> tuple[str, str, int]:
        return self.setting, self.question, self.sample

    @property
    def answer_tokens(self) -> int:
        return self.tokens - self.reasoning_tokens


class SampleLog:
    """The samples of one run, in memory and in the file, which is locked against other writers."""

    def __init__(self, path: Path, parameters: Mapping[str, Any]) -> None:
        """Opens or creates the file, and reads the samples in it.

        Raises `BadParameters` if the file has other parameters, is damaged, or is in use.
        """
        self.samples: dict[tuple[str, str, int], Sample] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab+")
        try:
            self._lock()
            self._resume(json.loads(json.dumps(parameters)))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "SampleLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, sample: Sample) -> None:
        """Appends a new sample to the file."""
        assert sample.key not in self.samples
        self._append(asdict(sample))
        self.samples[sample.key] = sample

    def _append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadParameters(f"{self._path}: another run is writing to it") from None

    def _resume(self, parameters: Mapping[str, Any]) -> None:
        self._file.seek(0)
        complete, end, torn = self._file.read().rpartition(b"\n")
        if torn:  # the line that was being written when the process was killed
            self._file.truncate(len(complete + end))
        if not complete:
            self._append({"format": FORMAT, "parameters": parameters})
            return
        head, *lines = complete.split(b"\n")
        self._check_head(head, parameters)
        for number, line in enumerate(lines, start=2):
            self._read(number, line)

    def _check_head(self, head: bytes, parameters: Mapping[str, Any]) -> None:
        try:
            header = json.loads(head)
            then, form = header["parameters"], header["format"]
        except (ValueError, LookupError, TypeError):
            raise BadParameters(f"{self._path}: not a file of samples") from None
        if form != FORMAT:
            raise BadParameters(f"{self._path}: written by another version (format {form})")
        names = sorted({*then, *parameters})
        changed = [name for name in names if then.get(name) != parameters.get(name)]
        if changed:
            differences = "; ".join(
                f"`{name}` was {_brief(then.get(name))} and is {_brief(parameters.get(name))}"
                for name in changed
            )
            raise BadParameters(
                f"{self._path} was written with other parameters: {differences}. Use the same "
                "parameters to resume, or another folder"
            )

    def _read(self, number: int, line: bytes) -> None:
        try:
            sample = Sample(**json.loads(line))
        except (ValueError, TypeError):
            raise BadParameters(f"{self._path}:{number}: not a sample") from None
        self.samples[sample.key] = sample


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
