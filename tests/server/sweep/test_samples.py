"""The file of samples survives a kill, and only a run with the same parameters continues it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from server.sweep.errors import BadParameters
from server.sweep.samples import Sample, SampleLog

MakeSample = Callable[..., Sample]
PARAMETERS = {"seed": 0, "lambdas": [0, 0.5], "model": "π"}


@pytest.fixture
def path(tmp_path: Path, make_sample: MakeSample) -> Path:
    """Returns the path of a file with two samples."""
    path = tmp_path / "out" / "samples.jsonl"
    with SampleLog(path, PARAMETERS) as log:
        log.add(make_sample("q1", text="λ"))
        log.add(make_sample("q2"))
    return path


def test_a_run_with_the_same_parameters_continues_the_file(
    path: Path, make_sample: MakeSample
) -> None:
    with SampleLog(path, PARAMETERS) as log:
        assert list(log.samples.values()) == [make_sample("q1", text="λ"), make_sample("q2")]
        log.add(make_sample("q3"))
    with SampleLog(path, PARAMETERS) as log:
        assert [sample.question for sample in log.samples.values()] == ["q1", "q2", "q3"]


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_a_line_that_was_cut_off_is_dropped(path: Path, make_sample: MakeSample, lost: int) -> None:
    path.write_bytes(path.read_bytes()[:-lost])
    with SampleLog(path, PARAMETERS) as log:
        assert [sample.question for sample in log.samples.values()] == ["q1"]
        log.add(make_sample("q2"))
    lines = path.read_text().splitlines()
    assert [json.loads(line).get("question") for line in lines] == [None, "q1", "q2"]


def test_a_file_without_a_complete_first_line_starts_again(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])
    with SampleLog(path, PARAMETERS) as log:
        assert not log.samples
    with SampleLog(path, PARAMETERS) as log:
        assert not log.samples


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"seed": 1}, "`seed` was 0 and is 1"),
        ({"lambdas": [0, 1]}, r"`lambdas` was \[0, 0.5\] and is \[0, 1\]"),
        ({"grader": "exact"}, '`grader` was null and is "exact"'),
    ],
)
def test_a_changed_parameter_is_refused_by_name_and_the_file_stays(
    path: Path, changed: dict[str, object], problem: str
) -> None:
    before = path.read_bytes()
    with pytest.raises(BadParameters, match=problem):
        SampleLog(path, PARAMETERS | changed)
    assert path.read_bytes() == before


def test_two_runs_cannot_write_to_one_file_at_once(path: Path) -> None:
    with SampleLog(path, PARAMETERS), pytest.raises(BadParameters, match="another run"):
        SampleLog(path, PARAMETERS)
    with SampleLog(path, PARAMETERS):
        pass


def test_a_damaged_line_is_named_by_its_number(path: Path) -> None:
    head, first, second = path.read_text().splitlines()
    path.write_text(f"{head}\n{first[:-9]}\n{second}\n")
    with pytest.raises(BadParameters, match=r"samples\.jsonl:2: not a sample"):
        SampleLog(path, PARAMETERS)


@pytest.mark.parametrize("head", ["[]", "{}", "nonsense", '{"format": 9, "parameters": {}}'])
def test_a_file_that_has_no_samples_is_refused(path: Path, head: str) -> None:
    path.write_text(head + "\n")
    with pytest.raises(BadParameters, match=r"not a file of samples|another version"):
        SampleLog(path, PARAMETERS)
