"""The GPU bench runs unattended: it measures every row, and whatever fails becomes a row too."""

import gc
import json
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import device_process, engine_rows, supervisor
from bench.gpu.__main__ import main
from bench.gpu.cases import (
    FULL,
    GROUPS,
    SMALL,
    START,
    SUBJECTS,
    Case,
    Job,
    Row,
    Run,
    Skipped,
    Subject,
    jobs_of,
    what_is_off,
)
from bench.gpu.device_process import Subjects, rows_of
from bench.gpu.engine_rows import EngineRows, pretend_computed
from bench.gpu.ratios import ratios
from bench.gpu.report import Report, line_of
from bench.gpu.supervisor import rows_of_group
from bench.models.random_pair import Place
from bench.models.shapes import TINY
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from tests.bench.processes import is_gone
from tests.contract.conftest import wait_until

PLACE = Place(torch.device("cpu"), torch.float32, positions=2048)
SMOKE = Run("4b", smoke=True)
FOREVER = float("inf")


def rows_here(run: Run, subjects: Iterable[Subject]) -> list[Row]:
    """Returns the rows of all jobs, done in this process."""
    groups = [[one for one in group if one in subjects] for group in GROUPS]
    jobs = [job for group in groups if group for job in jobs_of(group, run.scale)]
    return list(rows_of(jobs, run, FOREVER))


def key_of(row: Row) -> tuple[str, str, str]:
    return row["subject"], row["what"], row["lambdas"]


@pytest.fixture(scope="module")
def smoke() -> list[Row]:
    return rows_here(SMOKE, SUBJECTS)


def measured(rows: list[Row]) -> set[tuple[str, str, str]]:
    return {key_of(row) for row in rows if "seconds" in row}


def test_every_job_has_one_row_and_every_row_runs_on_tiny_shapes(smoke: list[Row]) -> None:
    assert not [row for row in smoke if "error" in row or "skipped" in row]
    wanted = Counter(job.subject for group in GROUPS for job in jobs_of(group, SMALL))
    assert Counter(row["subject"] for row in smoke) == wanted
    different = {(store, "decode", "different") for store in ("pair", "int8", "int4")}
    ends = {("pair", "decode", "instruct"), ("pair", "decode", "thinking")}
    peers = {("batching", "answers", "one"), ("generate", "decode", "one")}
    assert different | ends | peers <= measured(smoke)


def test_a_mixture_of_experts_has_the_same_rows(smoke: list[Row]) -> None:
    stores: tuple[Subject, ...] = ("static", "pair", "int8", "int4")
    experts = rows_here(Run("30b-a3b", smoke=True), stores)
    assert not [row for row in experts if "error" in row]
    assert measured(experts) == {key for key in measured(smoke) if key[0] in stores}


def test_each_kind_of_λ_is_computed_in_the_expected_way(smoke: list[Row]) -> None:
    ways = {"different": "pair", "one": "blended", "instruct": "endpoint", "thinking": "endpoint"}
    for row in smoke:
        if row["subject"] == "pair" and row["what"] == "decode":
            assert row["facts"]["ways"].keys() == {ways[row["lambdas"]]}, row


def test_rows_run_with_asynchronous_scheduling_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine_rows._config
    monkeypatch.setattr(
        engine_rows, "_config", lambda *about: replace(own(*about), async_scheduling=True)
    )
    rows = rows_here(SMOKE, ["pair"])
    assert not [row for row in rows if "error" in row or "skipped" in row]


# --- The order ------------------------------------------------------------------------------------


def test_the_first_row_of_each_subject_runs_before_all_others() -> None:
    jobs = jobs_of(("card", "static", "pair"), FULL)
    started = [job.subject for job in jobs if job.case == START]
    assert started == ["card", "static", "pair", "static"]
    first = Case("decode", "one", 32, 1024)
    assert jobs[:3] == [Job("card"), Job("static"), Job("static", first)]
    assert jobs.count(Job("static", first)) == 2, "it shows how the card drifts"
    last = [job.subject for job in jobs[jobs.index(Job("pair")) :]]
    assert last == sorted(last), "the pair is measured completely while it is in memory"


def test_a_single_subject_has_one_start_row() -> None:
    assert [job.case for job in jobs_of(["static"], FULL)].count(START) == 1


# --- Pretended contexts and memory ----------------------------------------------------------------


def test_a_pretended_context_is_a_prefix_cache_hit_and_needs_no_prefill() -> None:
    rows = EngineRows(TINY["4b"], "static", PLACE, SMALL)
    engine = rows.engine
    prompt, greedy = tuple(range(16, 65)), SamplingParams(temperature=0.0)
    requests = [
        EngineRequest(salt, prompt, Dial(0.5), greedy, cache_salt=salt) for salt in ("a", "b")
    ]
    for request in requests:
        pretend_computed(engine, request)
    for request in requests:
        engine.submit(request)
    assert [event.cached_tokens for event in engine.step()] == [48, 48]
    engine.scheduler.check_integrity()
    tables = [set(sequence.block_table) for sequence in engine.scheduler.running]
    assert not tables[0] & tables[1], "sequences share what attention reads"


def test_a_row_that_does_not_fit_in_memory_is_skipped_with_the_reason() -> None:
    rows = EngineRows(TINY["4b"], "static", PLACE, SMALL)
    with pytest.raises(Skipped, match="does not fit"):
        rows.measure(Case("decode", "one", 64, 48))


# --- Errors ---------------------------------------------------------------------------------------


def test_a_failing_row_is_reported_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: EngineRows, case: Case) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(EngineRows, "_prefill", fail)
    rows = rows_here(SMOKE, ["static"])
    (failed,) = [row for row in rows if "error" in row]
    assert failed["what"] == "prefill"
    assert failed["error"] == "RuntimeError: no kernel image is available"
    assert "seconds" in rows[-1]


def test_a_process_whose_rows_fail_ends_normally(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an error the process checks that its device still works, whatever the device is."""
    jobs = json.dumps([["card", {"what": "start"}]])
    arguments = ["--jobs", jobs, "--model", "4b", "--deadline", str(time.monotonic() + 60)]
    monkeypatch.setattr(sys, "argv", ["bench.gpu.device_process", *arguments])
    assert device_process.main() == 0
    assert "no CUDA device" in json.loads(capsys.readouterr().out)["error"]


def test_rows_of_a_subject_that_does_not_start_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu.engine_rows.Engine", None)
    start, *others, card = rows_of([*jobs_of(["static"], SMALL), Job("card")], SMOKE, FOREVER)
    assert start["error"].startswith("TypeError")
    assert {row["skipped"] for row in others} == {"its subject did not start"}
    assert card["card"]["bandwidth"] > 0


def test_jobs_without_time_left_are_skipped() -> None:
    jobs = jobs_of(["static"], SMALL)
    for rows in (rows_of(jobs, SMOKE, 0), rows_of_group(jobs, SMOKE, 0)):
        assert [row["skipped"] for row in rows] == ["out of time"] * len(jobs)


def test_a_subject_is_freed_before_the_next_one_starts() -> None:
    gc.unfreeze()  # nothing is freed that is part of a cycle with what other tests froze
    subjects = Subjects(SMOKE)
    subjects.row(Job("pair"))
    assert isinstance(subjects._now, EngineRows)
    engine, model = weakref.ref(subjects._now.engine), weakref.ref(subjects._now._model.model)
    subjects.end()
    assert engine() is None
    assert model() is None


def test_an_engine_on_a_gpu_without_cuda_graphs_or_kernels_is_an_error() -> None:
    good = {
        "attention": "triton (…)",
        "graphs": "12 captured, in 9 s",
        "pair_kernels": "up to 64 rows",
    }
    assert what_is_off(good, Run("4b")) == []
    assert what_is_off({**good, "pair_kernels": ""}, Run("4b")) == []  # static
    for fact, reported in (
        ("graphs", "none"),
        ("attention", "reference"),
        ("pair_kernels", "up to 0 rows"),
        ("pair_kernels", "off: they failed (…)"),
    ):
        (off,) = what_is_off({**good, fact: reported}, Run("4b"))
        assert reported in off
    assert what_is_off(good, Run("4b", compiled=True)) != []


# --- Processes ------------------------------------------------------------------------------------

# Replaces a process with a device: it does the first jobs, then exits with a code or hangs.
ENDS_EARLY = """
import json, sys, time
jobs = json.loads(sys.argv[sys.argv.index("--jobs") + 1])
stay = {stay}
for subject, case in jobs:
    if (subject, case["what"]) == {at}:
        time.sleep(60 if stay else 0)
        sys.exit(9)
    print(json.dumps({{"subject": subject, **case, "seconds": 1}}), flush=True)
"""


def process_ending_at(
    monkeypatch: pytest.MonkeyPatch, subject: str, what: str, stay: bool = False
) -> None:
    script = ENDS_EARLY.format(at=(subject, what), stay=stay)
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-ISc", script))


def test_after_a_process_dies_another_one_runs_the_remaining_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process_ending_at(monkeypatch, "static", "prefill")
    jobs = jobs_of(["static"], SMALL)
    rows = list(rows_of_group(jobs, SMOKE, time.monotonic() + 60))
    found = [(row["what"], "error" in row) for row in rows]
    expected = [(job.case.what, job.case.what == "prefill") for job in jobs]
    died = expected.index(("prefill", True))
    assert found == [*expected[: died + 1], ("start", False), *expected[died + 1 :]]


def test_a_subject_that_kills_its_process_at_start_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process_ending_at(monkeypatch, "static", "start")
    rows = list(rows_of_group(jobs_of(["static", "pair"], SMALL), SMOKE, time.monotonic() + 60))
    assert len(rows) == len(jobs_of(["static", "pair"], SMALL))
    assert all("seconds" in row for row in rows if row["subject"] == "pair")
    static = [row for row in rows if row["subject"] == "static"]
    assert {row["what"] for row in static if "error" in row} == {"start"}
    assert all("skipped" in row for row in static if row["what"] != "start")


def test_a_hanging_process_is_killed_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "GRACE", 0)
    process_ending_at(monkeypatch, "static", "decode", stay=True)
    jobs = jobs_of(["static"], SMALL)
    rows = list(rows_of_group(jobs, SMOKE, time.monotonic() + 0.5))
    assert len(rows) == len(jobs)
    assert rows[-1]["skipped"] == "out of time"


OUTLIVES = """
import sys, time
from bench.gpu import supervisor
from bench.gpu.cases import Job, Run
stays = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
supervisor.COMMAND = (sys.executable, "-ISc", stays)
list(supervisor.rows_of_group([Job("card")], Run("4b"), time.monotonic() + 60))
"""


def test_a_process_does_not_outlive_the_bench_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", OUTLIVES], stdout=subprocess.PIPE) as bench_alone:
        assert bench_alone.stdout is not None
        child = int(bench_alone.stdout.readline())
        bench_alone.kill()
    wait_until(lambda: is_gone(child))


def test_the_command_prints_rows_and_writes_them_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--smoke", "--only", "card", "--out", str(tmp_path)]) == 0
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert printed.startswith('{"subject"')
    (kept,) = json.loads((tmp_path / "gpu-4b-card-smoke.json").read_text())["rows"]
    assert json.loads(printed) == kept
    assert kept["card"]["rate"] > 0
    assert kept["machine"]["torch"] == torch.__version__


def test_an_error_sets_the_exit_code_and_the_other_rows_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Job("card").row(), Job("static").row(error="no"), Job("pair").row()]
    monkeypatch.setattr("bench.gpu.__main__.rows_of_all", lambda *_: iter(rows))
    assert main(["--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert len(json.loads(path.read_text())["rows"]) == 3


def test_a_run_that_measures_nothing_fails(tmp_path: Path) -> None:
    assert main(["--smoke", "--seconds", "0", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize("subjects", ["pairs", "card,", ""])
def test_unknown_subjects_are_refused(subjects: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--only", subjects])
    assert "choose from card, static, pair" in capsys.readouterr().err


def test_an_error_of_several_lines_is_printed_in_one_line() -> None:
    line = line_of(Job("card").row(error="CUDA error: it is lost\nCompile with DSA"))
    assert line.endswith("error: CUDA error: it is lost Compile with DSA")


def test_the_process_that_needs_no_device_imports_no_torch() -> None:
    code = "import sys, bench.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- The report -----------------------------------------------------------------------------------


def test_the_file_is_complete_after_every_row(tmp_path: Path) -> None:
    report = Report(SMOKE, ["static"], tmp_path)
    for count in range(1, 3):
        report.add(Job("static").row(skipped="no room"))
        (path,) = tmp_path.iterdir()
        assert len(json.loads(path.read_text())["rows"]) == count


def test_rows_are_compared_with_the_measured_card_or_else_its_data_sheet(
    smoke: list[Row], tmp_path: Path
) -> None:
    report = Report(SMOKE, SUBJECTS, tmp_path)
    for row in smoke:
        report.add(row)
    for row in report.rows:
        if row["what"] != "start":
            assert row["share"] == pytest.approx(row["bound_seconds"] / row["seconds"])
            assert row["bound_measured"]
    work = {"bytes": 3.35e12, "operations": 0.0}
    nominal = Report(SMOKE, ["int8"], tmp_path)
    nominal.add(Job("int8").row(machine={"device": "NVIDIA H100 80GB HBM3"}))
    nominal.add(decode("int8", "different", 2.0, work=work))
    assert nominal.rows[-1]["share"] == nominal.rows[-1]["bandwidth_share"] == 0.5
    assert not nominal.rows[-1]["bound_measured"]


def decode(subject: Subject, lambdas: Any, seconds: float, **more: Any) -> Row:
    rate = {"model": "4b", "compiled": False, "seconds": seconds, "tokens_a_second": 32 / seconds}
    return Job(subject, Case("decode", lambdas, 32, 1024)).row(**rate, **more)


def test_ratios_take_the_rows_of_several_runs_and_say_whether_their_target_is_met() -> None:
    first = [decode("static", "one", 1.0), decode("pair", "different", 2.0)]
    second = [decode("int8", "different", 2.0), {**decode("static", "one", 9.0), "tokens": 8192}]
    found = {ratio.name: (ratio.value, ratio.met) for ratio in ratios([*first, *second])}
    assert found == {
        "4b: different λ / static": (0.5, True),
        "4b: different λ of an int8 delta / static": (0.5, False),
    }


def test_compiled_rows_are_compared_with_compiled_rows() -> None:
    rows = [decode("static", "one", 1.0), decode("pair", "one", 1.0)]
    compiled = [{**row, "compiled": True} for row in (decode("static", "one", 0.5), rows[1])]
    found = {ratio.name: ratio.value for ratio in ratios([*rows, *compiled])}
    assert found == {"4b: hot λ / static": 1.0, "4b compiled: hot λ / static": 0.5}


@pytest.mark.parametrize(("seconds", "met"), [(1.0, True), (1.2, False)])
def test_first_token_ratio_target(seconds: float, met: bool) -> None:
    case = Case("first token", "never seen", 1, FULL.prompts[0])
    row = Job("pair", case).row(
        model="4b",
        compiled=False,
        seconds=seconds,
        tokens_a_second=1.0,
        facts={"hot_seconds": [0.9, 1.0, 7.0]},
    )
    (ratio,) = ratios([row])
    assert (ratio.value, ratio.met) == (seconds, met)


def test_ratios_of_missing_rows_are_left_out() -> None:
    assert ratios([]) == []
