"""`docs/three-stages.md` shows the measurements that are kept, and claims no more."""

import json
from typing import Any

import pytest

from bench import three_stages
from server.sweep.grid import ablation_groups
from server.sweep.stages import stages

PAGE = three_stages.PAGE.read_text()
PICTURES = sorted(three_stages.PICTURES.glob("*.svg"))
DRAWINGS = {
    "curve.svg": three_stages.draw_curve,
    "methods.svg": three_stages.draw_methods,
    "budgets.svg": three_stages.draw_budgets,
}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return three_stages.sweeps()


def test_the_tables_show_what_was_measured() -> None:
    assert three_stages.filled(PAGE) == PAGE, "write them again: python -m bench.three_stages"


def test_a_changed_number_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    other = three_stages.sweeps()
    other["curve"]["points"][3]["pass_at_k"] = 0.0042
    monkeypatch.setattr(three_stages, "sweeps", lambda: other)
    assert "0.004 |" in three_stages.filled(PAGE)


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_shows_the_current_numbers(path: Any) -> None:
    assert f">{three_stages.digest()}<" in path.read_text(), "python -m bench.three_stages"
    assert f"(three-stages/{path.name})" in PAGE


def test_every_picture_is_drawn_by_the_bench() -> None:
    assert {path.name for path in PICTURES} == set(DRAWINGS)


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_drawn_the_same_every_time(name: str, tmp_path: Any) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    DRAWINGS[name](first)
    DRAWINGS[name](second)
    assert first.read_bytes() == second.read_bytes()


def test_the_stages_follow_the_rule(measured: dict[str, Any]) -> None:
    curve = measured["curve"]
    found = stages([(it["lambda"], it["think_rate"]) for it in curve["points"]])
    assert found is not None
    assert found.json == curve["stages"][0]
    assert f"stage 1 ends at λ = {found.instruct_until:g}" in PAGE
    assert f"stage 3 begins at λ = {found.thinking_from:g}" in PAGE


def test_the_ablation_measures_the_dials_of_the_command(measured: dict[str, Any]) -> None:
    dials = {it["dial"] for it in measured["ablation"]["points"]}
    assert dials == set(ablation_groups(6)) == set(three_stages.ABLATION)


def test_every_measurement_has_150_questions_and_8_samples(measured: dict[str, Any]) -> None:
    points = [it for sweep in measured.values() for it in sweep["points"]]
    assert {(it["questions"], it["samples"]) for it in points} == {(150, 1200)}
    kept = json.loads(three_stages.BUDGETS_KEPT.read_text())["classes"]["default"]
    assert {it["answers"] for it in kept} == {1200}
