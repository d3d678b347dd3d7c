"""A checkpoint of `mi-server merge` answers as the server does, and a killed run writes none."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mi_runtime.model.merge_weights
from server.cli import main
from tests.contract.conftest import ROOT, ServerProcess, WaitUntil

QUESTIONS = ("a=6,b=a-2,c=b+6,d=c-3. d?", "Hello?")
LAYERS = {"default": 0.6, "attn": 0.8, "layers": {"0-1": 0.2, "3": {"mlp": 1.0}}}
DIALS: dict[str, Any] = {
    "one λ": 0.5,
    "λ by layer and an untied head": LAYERS | {"embed": 0.2, "head": 0.7},
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server.cli", "merge", *arguments]


def merge(*arguments: str) -> int:
    return main(["merge", *arguments])


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges the weights in this process, as importing torch in another takes seconds."""

    def run(command: list[str], check: bool) -> "subprocess.CompletedProcess[bytes]":
        _python, _m, module, *arguments = command
        assert (module, check) == ("mi_runtime.model.merge_weights", False)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        return subprocess.CompletedProcess(command, mi_runtime.model.merge_weights.main())

    monkeypatch.setattr("server.merge.merged_checkpoint.subprocess.run", run)


def served_answer(server: ServerProcess, question: str, dial: Any) -> Any:
    body = server.chat_body(question, temperature=0, reasoning_lambda=dial, max_tokens=80)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    return answer["choices"][0]["message"], answer["usage"]["completion_tokens"]


@pytest.mark.usefixtures("_in_this_process")
@pytest.mark.parametrize("dial", DIALS.values(), ids=DIALS)
def test_greedy_answers_of_the_merged_checkpoint_are_the_servers(
    real_server: ServerProcess, tmp_path: Path, dial: Any
) -> None:
    out = tmp_path / "merged"
    assert merge("--lambda", json.dumps(dial), "--dtype", "float32", "--out", str(out)) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.dtype == torch.float32
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            new = model.generate(**ids, do_sample=False, temperature=None, max_new_tokens=80)
        tokens = new[0, ids["input_ids"].shape[1] :]
        message, count = served_answer(real_server, question, dial)
        assert len(tokens) == count
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert text.endswith(message["content"])
        assert message.get("reasoning", "") in text


def test_a_killed_run_writes_no_checkpoint_and_the_next_run_writes_a_complete_one(
    tmp_path: Path, wait_until: WaitUntil
) -> None:
    out = tmp_path / "merged"
    process = subprocess.Popen(command("--lambda", "0.6", "--out", str(out)), cwd=ROOT)
    wait_until(lambda: any(tmp_path.iterdir()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert merge("--lambda", "0.6", "--out", str(out)) == 0
    card = (out / "README.md").read_text()
    assert "λ = 0.6" in card
    assert "base_model:\n- instruct\n- thinking\n" in card
    assert str(ROOT) not in card
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)
    files = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= files
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.usefixtures("_in_this_process")
def test_baseline_methods_write_a_checkpoint_too(tmp_path: Path) -> None:
    instruct = ROOT / "mi_runtime" / "embedded_pair" / "instruct"
    for method in ("task-arithmetic", "ties"):
        out = tmp_path / method
        assert merge("--method", method, "--base", str(instruct), "--out", str(out)) == 0
        assert f"--method {method} --base instruct --scale" in (out / "README.md").read_text()


REFUSED = {
    "no λ": ([], "interpolation requires --lambda"),
    "λ above 1": (["--lambda", "1.5"], "λ must be a number in [0, 1]"),
    "no number": (["--lambda", "much"], "--lambda: 'much' is neither a number nor a JSON object"),
    "a layer too far": (["--lambda", '{"default": 0, "layers": {"9": 1}}'], "layers 0 to 5"),
    "an unknown group": (["--lambda", '{"default": 0, "ffn": 1}'], "ffn"),
    "no base": (["--method", "ties"], "requires --base"),
    "no such endpoint": (["--lambda", "0.6", "--instruct", "/no/such"], "no such directory"),
}


@pytest.mark.parametrize(("flags", "reason"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_cannot_be_used_are_exit_code_2_and_nothing_is_written(
    tmp_path: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(*flags, "--out", str(tmp_path / "merged")) == 2
    assert reason in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_existing_directory_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("precious")
    assert merge("--lambda", "0.6", "--out", str(tmp_path)) == 2
    assert (tmp_path / "mine").read_text() == "precious"
    assert "exists already" in capsys.readouterr().err


@pytest.mark.usefixtures("_in_this_process")
def test_endpoints_that_do_not_match_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    instruct = ROOT / "mi_runtime" / "embedded_pair" / "instruct"
    other = tmp_path / "other"
    other.mkdir()
    for path in instruct.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    out = tmp_path / "merged"
    assert merge("--lambda", "0.6", "--thinking", str(other), "--out", str(out)) == 2
    printed = capsys.readouterr().err
    assert "rms_norm_eps" in printed
    assert "Traceback" not in printed
    assert not out.exists()
