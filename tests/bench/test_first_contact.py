"""First contact runs every step even if others fail, and its file is complete at any time."""

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.carried.missing_packages import normalized, unpack_missing
from bench.first_contact.__main__ import SECONDS, main
from bench.first_contact.gpu_tests import FILES
from bench.first_contact.ncu_counters import counted
from bench.first_contact.process_group import LONGEST_END, Ended
from bench.first_contact.record import Record
from bench.first_contact.steps import STEPS, Step
from bench.gpu_wheels import MACHINE, download, machine_packages
from tests.bench.processes import is_gone
from tests.contract.conftest import wait_until

ROOT = Path(__file__).parents[2]
FAKES = """
import json, os, signal, sys, time
from pathlib import Path

def row(**values):
    print(json.dumps({"subject": "fake", "what": "row", **values}), flush=True)

match sys.argv[1]:
    case "good":
        row(figure="42 apples")
        print("some words")
        print("an aside", file=sys.stderr)
    case "crash":
        row(figure="a row before the end")
        os.abort()
    case "garbage":
        sys.stdout.buffer.write(b'\\xff\\xfe {"subject": \\n{"subject": half\\n')
        row(figure="still read")
    case "reporting":
        row(error="RuntimeError: no kernel image is available")
    case "late":
        row(figure="in time")
        row(skipped="out of time")
    case "cuda":
        row(error="CUDA error: an illegal memory access\\nCompile with `TORCH_USE_CUDA_DSA` | see")
    case "deaf":  # a child that ignores SIGTERM and holds the pipe open
        row(figure="a row before the wait")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if pid := os.fork():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            Path(sys.argv[2]).write_text(f"{pid}\\n")
            time.sleep(0 if sys.argv[3] == "ends" else 600)
        else:
            time.sleep(600)
    case "counted":
        with open(sys.argv[2], "a") as file:
            file.write("run\\n")
"""

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs fake steps by `run({name: arguments}, *flags)`, which returns exit code and steps."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("bench.first_contact.process_group.PATIENCE", 0.2)
    monkeypatch.setattr("bench.first_contact.step_runner.REHEARSING", 1)

    def run(
        fakes: dict[str, tuple[str, ...]], *flags: str, least: int = 0, **limits: int
    ) -> tuple[int, dict[str, Any]]:
        steps = [
            Step(chr(97 + index), name, ("fakes", *fake), limits.get(name, 60), least, smoke=())
            for index, (name, fake) in enumerate(fakes.items())
        ]
        out = tmp_path / "out"
        code = main(["--smoke", "--out", str(out), *flags], steps)
        assert {path.name for path in out.iterdir()} >= {"first_contact.json", "first_contact.log"}
        return code, json.loads((out / "first_contact.json").read_text())["steps"]

    return run


def test_a_step_s_rows_are_kept_and_its_other_output_is_logged(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, steps = run({"apples": ("good",)})
    assert code == 0
    assert steps["apples"]["status"] == "ok"
    assert [row["figure"] for row in steps["apples"]["rows"]] == ["42 apples"]
    log = (tmp_path / "out/first_contact.log").read_text()
    assert "some words" in log
    assert "an aside" in log
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("| apples | ok |")
    assert line.endswith("| 42 apples |")


def test_a_step_that_crashes_or_prints_garbage_does_not_stop_the_next_one(run: Run) -> None:
    names = ("crash", "garbage", "reporting", "good")
    code, steps = run({name: (name,) for name in names})
    assert code == 1
    assert {name: step["status"] for name, step in steps.items()} == {
        "crash": "failed", "garbage": "ok", "reporting": "failed", "good": "ok"
    }  # fmt: skip
    assert steps["crash"]["why"] == "ended by SIGABRT"
    assert len(steps["crash"]["rows"]) == len(steps["garbage"]["rows"]) == 1
    assert "no kernel image" in steps["reporting"]["why"]


def test_an_error_of_several_lines_is_one_line_of_the_table(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run({"cuda": ("cuda",)})
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("| cuda | failed |")
    assert line.count("|") == 5


@pytest.mark.parametrize(("then", "status"), [("ends", "ok"), ("waits", "timed out")])
def test_no_process_of_a_step_is_left_running(
    run: Run, tmp_path: Path, then: str, status: str
) -> None:
    pid_file = tmp_path / "pid"
    limit = 60 if then == "ends" else 2
    _, steps = run({"deaf": ("deaf", str(pid_file), then), "good": ("good",)}, deaf=limit)
    assert steps["deaf"]["status"] == status
    assert steps["deaf"]["rows"]
    assert steps["good"]["status"] == "ok"
    wait_until(lambda: is_gone(int(pid_file.read_text())))


def test_steps_that_were_ok_are_not_run_again(run: Run, tmp_path: Path) -> None:
    count, path = tmp_path / "count", str(tmp_path / "out/first_contact.json")
    fakes = {"counted": ("counted", str(count)), "crash": ("crash",), "good": ("good",)}
    assert run(fakes, "--only", "counted, b")[0] == 1
    code, steps = run(fakes, "--resume", path, "--only", "a,c")
    assert count.read_text() == "run\n"
    assert code == 0, "the one that failed should not run"
    assert [step["status"] for step in steps.values()] == ["ok", "failed", "ok"]
    assert steps["crash"]["rows"], "rows of a step that is not run again are kept"


def test_a_step_that_timed_out_runs_again_after_the_others(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, steps = run({"late": ("late",), "crash": ("crash",)})
    assert code == 1
    assert steps["late"]["status"] == "partial"
    assert steps["late"]["why"] == "1 of 2 rows out of time"
    capsys.readouterr()
    path = str(tmp_path / "out/first_contact.json")
    code, steps = run({"late": ("good",), "crash": ("good",)}, "--resume", path)
    assert code == 0
    assert steps["late"]["status"] == "ok"
    begun = re.findall(r"^[ab] (\w+): -m", capsys.readouterr().out, re.MULTILINE)
    assert begun == ["crash", "late"]


def test_the_file_of_an_earlier_run_is_kept_under_another_name(run: Run, tmp_path: Path) -> None:
    for fake in ("good", "crash", "reporting"):
        run({"step": (fake,)})
    kept = [tmp_path / f"out/first_contact-{number}.json" for number in (1, 2)]
    found = [json.loads(file.read_text())["steps"]["step"]["status"] for file in kept]
    assert found == ["ok", "failed"]


def test_a_step_starts_only_with_the_time_that_it_needs(run: Run) -> None:
    code, steps = run({"late": ("good",)}, "--seconds", "30", least=40)
    assert code == 1
    assert steps["late"] == {"status": "not run", "seconds": 0.0, "why": "out of time", "rows": []}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "a,kernel"], "unknown: 'kernel'"),
        (["--only", ""], "unknown: ''"),
        (["--resume", "/nowhere/first_contact.json"], "No such file"),
        (["--resume", __file__], "Extra data"),
        (["--resume", "{other}"], "not a record of first contact"),
        (["--out", "{other}"], "no folder to write to"),
    ],
)
def test_bad_flags_are_reported_before_any_step(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"steps": {"pair": {"status": "ok", "seconds": 1}}}')
    with pytest.raises(SystemExit, match="2"):
        main(["--smoke", "--out", str(tmp_path), *(flag.format(other=other) for flag in flags)])
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize(
    ("has", "status", "code"), [(80, "not run", 0), (141, "ok", 0), (None, "ok", 0)]
)
def test_a_step_is_skipped_if_the_card_is_too_small(
    has: int | None, status: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.first_contact.step_runner.card_memory", lambda: has)
    step = Step("a", "large", ("this",), 60, 0, memory=130)
    assert main(["--out", str(tmp_path)], [step]) == code
    steps = json.loads((tmp_path / "first_contact.json").read_text())["steps"]
    assert steps["large"]["status"] == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_run_ends_its_step_and_leaves_a_complete_file(
    number: signal.Signals, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    (tmp_path / "fakes.py").write_text(FAKES)
    program = (
        "import sys; from bench.first_contact import process_group; "
        "from bench.first_contact.__main__ import main; "
        "from bench.first_contact.steps import Step; "
        "process_group.PATIENCE = 0.2; "
        f"command = ('fakes', 'deaf', {str(pid_file)!r}, 'waits'); "
        "sys.exit(main(sys.argv[1:], [Step('a', 'deaf', command, 60, 0, smoke=())]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-c", program, "--smoke", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
        process.send_signal(number)
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert re.search(r"^\| deaf \| failed \| \d+ \| interrupted", out, re.MULTILINE)
    assert json.loads((tmp_path / "out/first_contact.json").read_text())["steps"]["deaf"]["rows"]
    wait_until(lambda: is_gone(int(pid_file.read_text())))


def test_the_file_is_complete_whenever_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "first_contact.json"
    record = Record(path)
    statuses = []
    record.begin("one", ["bench.fake"])
    for write in (
        lambda: record.add("one", {"subject": "fake"}),
        lambda: record.end("one", Ended("ok", 1.0)),
        lambda: record.leave_out("two", "out of time"),
    ):
        write()
        statuses.append([step["status"] for step in json.loads(path.read_text())["steps"].values()])
    assert statuses == [["running"], ["ok"], ["ok", "not run"]]


# --- Packages carried to the GPU machine ---------------------------------------------------------


def test_only_wheels_of_missing_packages_are_unpacked(tmp_path: Path) -> None:
    for name in ("torch-2.11.0-cp312-cp312-linux_x86_64", "not_there-1.0-py3-none-any"):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
    assert unpack_missing(tmp_path, tmp_path / "site") == ["not_there-1.0-py3-none-any.whl"]
    assert (tmp_path / "site/not_there/__init__.py").exists()
    assert not (tmp_path / "site/torch").exists()


def test_the_list_of_the_gpu_machine_s_packages_is_read() -> None:
    found = machine_packages(MACHINE.read_text())
    assert found["torch"] == "2.11.0"
    assert found["pytest"] is None
    assert "fastapi" not in found
    assert all(normalized(name) == name for name in found)


def test_a_list_by_pip_freeze_is_read_too() -> None:
    text = "# made there\ntorch==2.11.0+cu130\nPy_Yaml @ file:///wheels/it.whl\n-e git+https://x\n"
    assert machine_packages(text) == {"torch": "2.11.0", "py-yaml": None}


def test_wheels_are_replaced_only_if_all_of_them_were_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old-1.0-py3-none-any.whl").touch()

    def pip(command: str, *arguments: str) -> None:
        Path(arguments[arguments.index("--dest") + 1], "new-1.0-py3-none-any.whl").touch()
        if "gone==1.0" in arguments:
            raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr("bench.gpu_wheels._pip", pip)
    with pytest.raises(subprocess.CalledProcessError):
        download({"new": "1.0", "gone": "1.0"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old-1.0-py3-none-any.whl"]
    download({"new": "1.0"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new-1.0-py3-none-any.whl"]


# --- Output -------------------------------------------------------------------------------------


def test_counters_are_read_from_what_ncu_prints() -> None:
    output = (
        '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum"\n'
        '"","","us","Mbyte"\n"0","_product","71.5","201.3"\n'
    )
    assert counted(output) == {
        "gpu__time_duration.sum [us]": "71.5", "dram__bytes.sum [Mbyte]": "201.3"
    }  # fmt: skip
    assert counted("==ERROR== no permission") == {}


def test_ratios_are_taken_of_the_rows_of_all_steps(tmp_path: Path) -> None:
    record = Record(tmp_path / "first_contact.json")
    row = {"what": "decode", "sequences": 32, "tokens": 1024, "model": "4b", "compiled": False}
    for step, subject, kind, rate in (
        ("pair", "static", "one", 100),
        ("deltas", "int8", "different", 70),
    ):
        record.begin(step, [])
        record.add(
            step,
            {**row, "subject": subject, "lambdas": kind, "seconds": 1, "tokens_a_second": rate},
        )
    assert record.ratios(smoke=False) == [
        "4b: different λ of an int8 delta / static: 0.700 (≥ 0.62: met)"
    ]


# --- The steps -----------------------------------------------------------------------------------


def test_the_first_five_steps_all_start_in_the_first_call() -> None:
    """They start however long each of them takes."""
    assert [step.letter for step in STEPS] == list("abcdefghij")
    *before, last = STEPS[:5]
    assert sum(step.limit + LONGEST_END for step in before) + last.least <= SECONDS - LONGEST_END
    assert all(step.least <= step.limit for step in STEPS)


def test_the_process_that_runs_the_steps_imports_no_torch_or_triton() -> None:
    program = "import sys, bench.first_contact.__main__; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "triton"} & set(done.stdout.split())


def test_every_test_that_needs_a_gpu_runs_in_first_contact() -> None:
    """Only `test_bench.py` is left to the steps that run the bench itself."""
    there = {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert {name for names in FILES.values() for name in names} == there - {"test_bench.py"}
