"""The GPU bench runs unattended: every row on tiny shapes, and whatever fails is a row too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.gpu
from bench.gpu import Run, main, rows_of, rows_of_child
from bench.gpu_bounds import TINY
from bench.gpu_pairs import Place
from bench.gpu_report import Report, ratios, reference_of
from bench.gpu_rows import SMALL, Case, Rows, Skipped, pretend_computed
from mi_runtime.request import Dial, EngineRequest, SamplingParams

PLACE = Place(torch.device("cpu"), torch.float32, positions=2048)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_smoke("4b", tmp_path_factory.mktemp("gpu"))


def run_smoke(model: str, folder: Path, *arguments: str) -> Any:
    assert main(["--smoke", "--model", model, "--out", str(folder), *arguments]) == 0
    return json.loads((folder / f"gpu-{model}-smoke.json").read_text())


def measured(record: Any) -> set[tuple[str, str, str]]:
    return {
        (row["subject"], row["what"], row["lambdas"]) for row in record["rows"] if "share" in row
    }


def test_every_row_runs_on_tiny_shapes(smoke: Any) -> None:
    assert not [row for row in smoke["rows"] if "error" in row]
    kinds = ("one", "different")
    wanted = {
        *((store, "decode", "one") for store in ("static", "generate")),
        *((store, what, "one") for store in ("static",) for what in ("prefill", "answers")),
        *(("pair", what, kind) for what in ("prefill", "answers") for kind in kinds),
        *((store, "decode", kind) for store in ("pair", "int8", "int4") for kind in kinds),
        ("pair", "first token", "never seen"),
        ("batching", "answers", "one"),
    }
    assert wanted <= measured(smoke)
    assert smoke["card"]["bandwidth"] > 0
    assert smoke["machine"]["torch"] == torch.__version__


def test_a_mixture_of_experts_has_the_same_rows(smoke: Any, tmp_path: Path) -> None:
    experts = run_smoke("30b-a3b", tmp_path, "--only", "card,static,pair,int8,int4")
    assert not [row for row in experts["rows"] if "error" in row]
    peers = ("batching", "generate")
    assert measured(experts) == {row for row in measured(smoke) if row[0] not in peers}


def test_every_row_is_held_against_a_bound_and_the_ratios_are_there(smoke: Any) -> None:
    for row in smoke["rows"]:
        if row["what"] != "start" and "skipped" not in row:
            assert row["share"] == pytest.approx(row["bound_seconds"] / row["seconds"])
    assert {"mixed λ / static, seconds a step", "never-seen λ / hot λ, first token"} <= {
        *smoke["ratios"]
    }


def test_rows_of_different_λ_go_by_the_pair_product_and_tell_so(smoke: Any) -> None:
    (row,) = (
        row for row in smoke["rows"]
        if (row["subject"], row["what"], row["lambdas"]) == ("pair", "answers", "different")
    )  # fmt: skip
    assert row["facts"]["ways"]["pair"] > 0


# --- Contexts that nobody computed ---------------------------------------------------------------


def test_a_pretended_context_is_found_and_its_sequences_decode_from_the_first_step_on() -> None:
    rows = Rows(TINY["4b"], "static", PLACE, SMALL)
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


def test_a_row_that_memory_has_no_room_for_says_so() -> None:
    rows = Rows(TINY["4b"], "static", PLACE, SMALL)
    with pytest.raises(Skipped, match="does not fit"):
        rows.measure(Case("decode", "one", 64, 48))


# --- What goes wrong ------------------------------------------------------------------------------


def test_a_failing_row_is_told_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Rows, case: Case) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(Rows, "_prefill", fail)
    rows = list(rows_of("static", Run("4b", smoke=True), seconds=60))
    failed = [row for row in rows if "error" in row]
    assert [row["what"] for row in failed] == ["prefill"]
    assert failed[0]["error"] == "RuntimeError: no kernel image is available"
    assert "seconds" in rows[-1]


def test_a_subject_that_does_not_start_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu_rows.Engine", None)
    (row,) = rows_of("static", Run("4b", smoke=True), seconds=60)
    assert row["what"] == "start"
    assert row["error"].startswith("TypeError")


def test_what_has_no_time_left_is_skipped() -> None:
    started, *rows = rows_of("static", Run("4b", smoke=True), seconds=0)
    assert "engine" in started
    assert {row["skipped"] for row in rows} == {"out of time"}


def test_a_subject_has_a_process_of_its_own() -> None:
    (row,) = rows_of_child("card", Run("4b", smoke=True), seconds=120)
    assert row["card"]["rate"] > 0


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.gpu, "GRACE", 0)
    (row,) = rows_of_child("static", Run("4b", smoke=True), seconds=0.1)
    assert row["error"] == "the process ended early: out of time"


# --- The report -----------------------------------------------------------------------------------


def test_the_file_is_whole_after_every_row(tmp_path: Path) -> None:
    report = Report("gpu-test", tmp_path)
    row = {"subject": "static", "what": "decode", "lambdas": "one", "sequences": 2, "tokens": 16}
    for count in range(1, 3):
        report.add({**row, "skipped": "no room"})
        (path,) = tmp_path.iterdir()
        assert len(json.loads(path.read_text())["rows"]) == count


def test_ratios_of_rows_that_are_not_there_are_left_out() -> None:
    assert ratios([], reference_of(SMALL)) == {}
