"""Finished samples become a report: a JSON file, a CSV file, tables and a page."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from server.sweep.curves import ClassReport, measure
from server.sweep.grid import Decoding, Setting, curves_of, settings_of
from server.sweep.html_report import write_html
from server.sweep.report import table, write_numbers
from server.sweep.samples import Sample
from server.sweep.tasks import Task, embedded_task

MakeSample = Callable[..., Sample]
TASK = embedded_task(12, 0)
PARAMETERS = {"model": "<pair>", "seed": 0}


def samples_of(settings: list[Setting], make: MakeSample) -> list[Sample]:
    """Returns samples in which short chains are correct, and long ones from λ = 0.5 on."""
    return [
        make(
            question.id,
            number,
            setting=setting.label,
            correct=question.kind == "short" or setting.reasoning_lambda >= 0.5,
            thought=setting.reasoning_lambda > 0.5,
            tokens=10 + int(100 * setting.reasoning_lambda),
            reasoning_tokens=int(100 * setting.reasoning_lambda),
        )
        for setting in settings
        for question in TASK.questions
        for number in range(2)
    ]


def reports_of(
    curves: list[list[Setting]], make: MakeSample, task: Task = TASK, votes: bool = True
) -> list[ClassReport]:
    return measure(samples_of(settings_of(curves), make), curves, task, seed=0, votes=votes)


@pytest.fixture
def reports(make_sample: MakeSample) -> list[ClassReport]:
    return reports_of(curves_of([0, 0.5, 1], ["all"], [0.7], [1.0]), make_sample)


def test_all_questions_come_first_then_every_class(reports: list[ClassReport]) -> None:
    assert [report.name for report in reports] == ["default", "long", "short"]
    everything, long, short = (report.points for report in reports)
    for complete, *parts in zip(everything, long, short, strict=True):
        assert complete.questions == sum(part.questions for part in parts) == 12
        assert complete.samples == 24
    assert [point.value("mean_at_k") for point in short] == [1, 1, 1]
    assert [point.value("mean_at_k") for point in long] == [0, 1, 1]


def test_a_curve_has_its_stages_and_its_front(reports: list[ClassReport]) -> None:
    curve = reports[0].curves[0]
    assert str(curve.stages) == "stage 1 up to λ = 0.5, stage 3 from λ = 1 on"
    assert [point.reasoning_lambda for point in curve.front] == [0, 0.5]


def test_the_order_of_samples_changes_nothing(make_sample: MakeSample) -> None:
    curves = curves_of([0, 1], ["all"], [0.7], [1.0])
    samples = samples_of(settings_of(curves), make_sample)
    one, other = (
        measure(order, curves, TASK, seed=0, votes=True) for order in (samples, samples[::-1])
    )
    assert [it.json for it in one] == [it.json for it in other]


def test_the_json_has_the_points_and_the_rule(reports: list[ClassReport], tmp_path: Path) -> None:
    write_numbers(tmp_path, reports, PARAMETERS)
    written = json.loads((tmp_path / "report.json").read_text())
    assert [point["lambda"] for point in written["points"]] == [0, 0.5, 1]
    names = (
        "lambda think_rate mean_at_k pass_at_k vote_at_k tokens_mean tokens_p50 tokens_p90 "
        "reasoning_tokens_p50 reasoning_tokens_p90 malformed unfinished"
    )
    for point in written["points"]:
        assert set(names.split()) <= set(point)
        low, high = point["intervals"]["mean_at_k"]
        assert low <= point["mean_at_k"] <= high
    stages = {"found": True, "instruct_until": 0.5, "thinking_from": 1}
    assert written["curves"][0]["stages"] == stages
    assert written["curves"][0]["pareto_front"] == [0, 0.5]
    assert set(written["classes"]) == {"long", "short"}
    assert written["parameters"] == PARAMETERS
    assert "think rate" in written["stage_rule"]


def test_the_csv_has_a_row_for_each_class_and_point(
    reports: list[ClassReport], tmp_path: Path
) -> None:
    write_numbers(tmp_path, reports, PARAMETERS)
    with (tmp_path / "points.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["lambda"]) for row in rows][:4] == [
        ("default", "0"), ("default", "0.5"), ("default", "1"), ("long", "0")
    ]  # fmt: skip
    assert all(float(row["mean_at_k_low"]) <= float(row["mean_at_k"]) for row in rows)


def test_a_grader_without_votes_leaves_them_empty(make_sample: MakeSample, tmp_path: Path) -> None:
    reports = reports_of(curves_of([0], ["all"], [0.7], [1.0]), make_sample, votes=False)
    write_numbers(tmp_path, reports, PARAMETERS)
    point = json.loads((tmp_path / "report.json").read_text())["points"][0]
    assert point["vote_at_k"] is None
    assert " – " in table(reports[0])


def test_a_table_has_a_row_for_each_point_and_marks_the_front(reports: list[ClassReport]) -> None:
    title, _, _, *rows = table(reports[0]).splitlines()
    assert title.startswith("all questions (12), T=0.7 top_p=1 top_k=0: stage 1 up to λ = 0.5")
    assert [row.split("|")[1].strip() for row in rows] == ["0*", "0.5*", "1"]


def test_without_a_rise_of_the_think_rate_no_transition_is_found(make_sample: MakeSample) -> None:
    (report, *_) = reports_of(curves_of([0, 0.5], ["all"], [0.7], [1.0]), make_sample)
    assert report.json["curves"][0]["stages"] == {"found": False}
    assert "no transition found" in table(report)


def test_the_page_loads_nothing_and_escapes_its_texts(
    reports: list[ClassReport], tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_html(path, reports, PARAMETERS)
    page = path.read_text()
    assert "<pair>" not in page
    assert page.count("<svg") == 3  # a figure a class
    assert not any(word in page for word in ("<script", "src=", "<link", "@import"))
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part[: part.index("</svg>") + 6])
    write_html(tmp_path / "again.html", reports, PARAMETERS)
    assert (tmp_path / "again.html").read_text() == page


def test_ablations_and_decodings_are_curves_of_one_report(make_sample: MakeSample) -> None:
    instruct = Decoding(0.7, 0.8, 20)
    curves = curves_of([0, 0.8], ["all", "mlp"], [0.6, 1.0], [0.95], 20, instruct)
    (report, *_) = reports_of(curves, make_sample)
    assert [curve.name for curve in report.curves] == [
        "T=0.6 top_p=0.95 top_k=20",
        "T=1 top_p=0.95 top_k=20",
        "λ in mlp only, T=0.6 top_p=0.95 top_k=20",
        "λ in mlp only, T=1 top_p=0.95 top_k=20",
    ]
    assert len(report.points) == 6  # λ = 0 once for each dial
