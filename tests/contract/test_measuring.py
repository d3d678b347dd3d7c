"""`mi-server sweep` and `calibrate` measure the embedded pair from their command lines."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.cli import main
from server.routing.profiles import load_profile
from server.sweep.arguments import calibrate_parser, parse_arguments
from tests.contract.conftest import ROOT, ServerProcess, WaitUntil

SMALL = ["--lambdas", "0,0.5,1", "--questions", "6", "--samples", "2", "--seed", "5"]


def sweep(out: Path, *more: str) -> dict[str, Any]:
    """Runs a small sweep, and returns its report."""
    assert main(["sweep", *SMALL, "--out", str(out), *more]) == 0
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def swept(real_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("sweep")
    return out, sweep(out, "--url", real_server.url)


def test_a_sweep_of_a_running_server_reports_every_lambda(swept: tuple[Path, Any]) -> None:
    out, report = swept
    instruct, _, thinking = report["points"]
    assert [point["lambda"] for point in report["points"]] == [0, 0.5, 1]
    assert all((point["questions"], point["samples"]) == (6, 12) for point in report["points"])
    assert (instruct["think_rate"], thinking["think_rate"]) == (0, 1)
    assert instruct["mean_at_k"] < thinking["mean_at_k"]
    assert instruct["reasoning_tokens_p90"] == 0 < thinking["reasoning_tokens_p50"]
    assert report["curves"][0]["stages"]["found"]
    assert {"report.html", "points.csv", "samples.jsonl"} <= {it.name for it in out.iterdir()}


def test_the_concurrency_of_a_sweep_does_not_change_its_report(
    real_server: ServerProcess, swept: tuple[Path, Any], tmp_path: Path
) -> None:
    """With more requests at a time, the answers arrive in another order."""
    _, report = swept
    assert sweep(tmp_path, "--url", real_server.url, "--concurrency", "3") == report


def test_another_seed_gives_other_samples(
    real_server: ServerProcess, swept: tuple[Path, Any], tmp_path: Path
) -> None:
    _, report = swept
    assert sweep(tmp_path, "--url", real_server.url, "--seed", "6")["points"] != report["points"]


def test_a_finished_sweep_sends_no_request_and_reports_again(
    real_server: ServerProcess, swept: tuple[Path, Any], tmp_path: Path
) -> None:
    out, report = swept
    (tmp_path / "samples.jsonl").write_bytes((out / "samples.jsonl").read_bytes())
    answered = real_server.get("/metrics").text
    assert sweep(tmp_path, "--url", real_server.url) == report
    count = "mi_request_success_total"
    assert lines_of(real_server.get("/metrics").text, count) == lines_of(answered, count)


def lines_of(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(name)]


def test_another_parameter_is_refused_by_name(
    real_server: ServerProcess,
    swept: tuple[Path, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, _ = swept
    (tmp_path / "samples.jsonl").write_bytes((out / "samples.jsonl").read_bytes())
    arguments = [*SMALL, "--url", real_server.url, "--out", str(tmp_path), "--temperature", "0.6"]
    assert main(["sweep", *arguments]) == 2
    assert "`temperature` was [0.7] and is [0.6]" in capsys.readouterr().err


def test_a_killed_sweep_ends_its_server_and_can_be_continued(
    real_server: ServerProcess, swept: tuple[Path, Any], tmp_path: Path, wait_until: WaitUntil
) -> None:
    """The killed sweep starts its own server, and is continued on the running one of `swept`."""
    samples = tmp_path / "samples.jsonl"
    arguments = [*SMALL, "--out", str(tmp_path), "--concurrency", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "sweep", *arguments],
        cwd=ROOT,
        env={**os.environ, "MI_SERVED_MODEL_NAME": "pair"},
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: samples.exists() and samples.read_bytes().count(b"\n") > 6, 120)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    finished = samples.read_bytes()
    assert len(children) == 2
    assert finished.count(b"\n") < 1 + 3 * 6 * 2, "the sweep ended before it was killed"
    wait_until(lambda: not any(it.is_running() for it in children))

    report = sweep(tmp_path, "--url", real_server.url)
    assert samples.read_bytes().startswith(finished[: finished.rindex(b"\n")])
    assert report["points"] == swept[1]["points"]


def test_an_ablation_of_a_file_of_questions_reports_every_dial(
    real_server: ServerProcess, tmp_path: Path
) -> None:
    task = tmp_path / "digits.jsonl"
    lines = [{"question": f"a={n},b=a+1. b?", "answer": str(n + 1)} for n in range(2)]
    task.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--task", str(task), "--grader", "numeric", "--samples", "1", "--lambdas", "0.8"]
    arguments += ["--ablate", "--temperature", "0"]
    arguments += ["--url", real_server.url, "--out", str(tmp_path)]
    assert main(["sweep", *arguments]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    dials = ["all", "mlp", "attn", "0-3", "2-5", "0-1", "2-3", "4-5"]
    assert [point["dial"] for point in report["points"]] == dials
    rates = {point["dial"]: point["think_rate"] for point in report["points"]}
    assert rates["all"] == 1
    assert rates["0-1"] == 0


def test_a_calibration_writes_a_profile_with_its_command(
    real_server: ServerProcess, tmp_path: Path
) -> None:
    out = tmp_path / "profile.json"
    arguments = ["--url", real_server.url, "--lambdas", "0,0.4,0.6,1", "--questions", "5"]
    arguments += ["--samples", "2", "--budget-samples", "80", "--target-interval", "0.2"]
    arguments += ["--api-key", "secret", "--out", str(out)]
    assert main(["calibrate", *arguments]) == 0
    profile = load_profile(out)
    points = profile.classes["default"].points
    lambdas = [point.reasoning_lambda for point in points]
    assert {0, 0.4, 0.6, 1} < set(lambdas)
    assert any(0.4 < value < 0.6 for value in lambdas), "the bend was not measured"
    assert sum(point.samples or 0 for point in points) <= 80
    assert points[0].think_rate == 0 < points[-1].reasoning_tokens.mean
    assert profile.name == "pair"
    command = profile.source.command
    assert command is not None
    assert command.startswith("mi-server calibrate --url")
    assert "secret" not in command

    samples = (out.with_name("profile.json.work") / "samples.jsonl").read_bytes()
    assert main(["calibrate", *arguments]) == 0  # it plans the same rounds, and sends no request
    assert (out.with_name("profile.json.work") / "samples.jsonl").read_bytes() == samples
    assert load_profile(out).classes == profile.classes


def test_the_built_in_profile_was_measured_on_the_embedded_pair(real_server: ServerProcess) -> None:
    """A change of the pair requires a new profile, made with the command in the file."""
    profile = load_profile(ROOT / "server" / "routing" / "builtin_profiles" / "embedded.json")
    card = real_server.get("/v1/models").json()["data"][0]
    assert profile.pair.model_dump() == {
        name: card["pair"][name] for name in ("identity", "instruct", "thinking")
    }
    assert set(profile.classes) == {"default", "short", "long"}
    command = profile.source.command
    assert command is not None
    parse_arguments(calibrate_parser(), shlex.split(command)[2:])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--instruct", "nowhere", "--thinking", "nowhere"], "the server refused to start"),
        (["--", "--no-such-flag"], "the server refused to start"),
        (["--url", "http://127.0.0.1:1", "--dials", "ffn"], "did not answer"),
        (["--task", "none.jsonl", "--grader", "exact"], "none.jsonl"),
    ],
)
def test_sweep_errors_name_the_reason(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.sweep.http_client.FIRST_TRIES", 1)
    assert main(["sweep", *SMALL, "--out", str(tmp_path / "out"), *arguments]) in (1, 2)
    assert reason in capsys.readouterr().err
