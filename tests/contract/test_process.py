"""The server process handles clients that leave, engines that die, and signals, with exit codes."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

import server
from server.cli import main
from tests.contract.conftest import ROOT, ServerProcess, StartFake, WaitUntil


@contextmanager
def stream(process: ServerProcess, content: str, **fields: Any) -> Iterator[Iterator[str]]:
    """Opens a stream, and gives its lines."""
    body = process.chat_body(content, stream=True, **fields)
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{process.url}/v1/chat/completions", json=body) as response,
    ):
        assert response.status_code == 200
        yield response.iter_lines()


def data(line: str) -> Any:
    return json.loads(line.removeprefix("data: "))


def aborted(process: ServerProcess) -> float:
    """Returns how many requests ended because their client left."""
    text = process.get("/metrics").text
    pattern = r'^mi_request_success_total\{finished_reason="abort",.*\} (\S+)$'
    return sum(float(it) for it in re.findall(pattern, text, re.MULTILINE))


# --- clients that leave ---


def test_a_client_that_leaves_its_stream_frees_the_engine(
    fake_server: ServerProcess, wait_until: WaitUntil
) -> None:
    before = aborted(fake_server)
    with stream(fake_server, "forever") as lines:
        next(lines)
        wait_until(lambda: fake_server.gauge("mi_num_requests_running") == 1)
    wait_until(lambda: fake_server.gauge("mi_num_requests_running") == 0)
    wait_until(lambda: aborted(fake_server) == before + 1)


def test_a_client_that_leaves_a_plain_answer_frees_the_engine(
    fake_server: ServerProcess, wait_until: WaitUntil
) -> None:
    address = urlsplit(fake_server.url)
    body = json.dumps(fake_server.chat_body("forever")).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: fake_server.gauge("mi_num_requests_running") == 1)
    wait_until(lambda: fake_server.gauge("mi_num_requests_running") == 0)


def test_a_client_that_leaves_a_waiting_request_frees_the_engine(
    fake_server: ServerProcess, wait_until: WaitUntil
) -> None:
    with stream(fake_server, "wait"):
        wait_until(lambda: fake_server.gauge("mi_num_requests_waiting") == 1)
    wait_until(lambda: fake_server.gauge("mi_num_requests_waiting") == 0)


def test_a_client_that_leaves_while_sending_is_logged_as_a_499(
    fake_server: ServerProcess, wait_until: WaitUntil
) -> None:
    address, line = urlsplit(fake_server.url), "POST /v1/chat/completions 499"
    before = fake_server.output.count(line)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"mo'
        )
    wait_until(lambda: fake_server.output.count(line) == before + 1)
    assert "Traceback" not in fake_server.output


def test_a_stream_without_events_gets_keep_alive_comments(fake_server: ServerProcess) -> None:
    with stream(fake_server, "wait") as lines:
        received = [line for line, _ in zip((it for it in lines if it), range(3), strict=False)]
    assert received[1:] == [": keep-alive", ": keep-alive"]


def test_a_full_queue_is_a_503_with_retry_after(
    start_fake: StartFake, wait_until: WaitUntil
) -> None:
    process = start_fake("--max-num-seqs", "1", "--max-waiting", "1")
    with stream(process, "forever"), stream(process, "wait"):
        wait_until(lambda: process.gauge("mi_num_requests_waiting") == 1)
        response = httpx.post(
            f"{process.url}/v1/chat/completions", json=process.chat_body("say x", stream=True)
        )
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
        assert 1 <= int(response.headers["Retry-After"]) <= 120
    refused = r'mi_admission_rejections_total{model_name="pair",reason="overloaded"} 1.0'
    assert refused in process.get("/metrics").text


# --- engines that die ---


def test_a_killed_engine_ends_every_stream_and_the_server(
    start_fake: StartFake, wait_until: WaitUntil
) -> None:
    process = start_fake()
    with stream(process, "forever") as first, stream(process, "wait") as second:
        wait_until(lambda: process.gauge("mi_num_requests_running") == 1)
        process.engine.kill()
        endings = [[line for line in lines if line][-1] for lines in (first, second)]
        health = process.get("/health")
    assert [data(line)["error"]["code"] for line in endings] == ["engine_dead"] * 2
    assert health.status_code == 503
    assert health.json()["error"]["code"] == "engine_dead"
    assert process.exit_code() == 1
    assert "The engine process ended (exit code -9)" in process.output


def test_a_pair_that_cannot_be_served_is_exit_code_2_with_the_reason(start_fake: StartFake) -> None:
    process = start_fake(worker=["--fail-load", "model.norm.weight differs"], wait=False)
    assert process.exit_code() == 2
    assert "model.norm.weight differs" in process.output


def test_a_checkpoint_without_tokenizer_json_is_exit_code_2(
    pair_directory: Path, tmp_path: Path, start_fake: StartFake
) -> None:
    shutil.copytree(pair_directory, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    process = start_fake(thinking=tmp_path / "bare", wait=False)
    assert process.exit_code() == 2
    assert "no tokenizer.json" in process.output
    assert "Traceback" not in process.output


def test_a_closing_sequence_without_the_tag_is_exit_code_2(start_fake: StartFake) -> None:
    process = start_fake("--think-closing", "The end.", wait=False)
    assert process.exit_code() == 2
    assert "think_closing: 'The end.' must contain the closing tag" in process.output
    assert "Traceback" not in process.output


# --- signals ---


def test_sigterm_lets_running_streams_finish(start_fake: StartFake, wait_until: WaitUntil) -> None:
    process = start_fake(worker=["--step-seconds", "0.02"])
    with stream(process, "forever", max_tokens=60) as lines:
        next(lines)
        process.terminate()
        wait_until(lambda: process.get("/ready").status_code == 503)
        assert process.get("/ready").json()["error"]["code"] == "draining"
        assert process.get("/health").status_code == 200
        refused = httpx.post(f"{process.url}/v1/chat/completions", json=process.chat_body("say x"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        *_, last, done = [line for line in lines if line]
    assert data(last)["choices"][0]["finish_reason"] == "length"
    assert done == "data: [DONE]"
    assert process.exit_code() == 0


def test_a_stream_that_outlasts_the_drain_time_ends_with_an_error(start_fake: StartFake) -> None:
    process = start_fake("--drain-timeout", "0.2")
    with stream(process, "wait") as lines:
        process.terminate()
        *_, last = [line for line in lines if line]
    assert data(last)["error"]["code"] == "draining"
    assert process.exit_code() == 0


def test_sigterm_while_loading_ends_the_server(
    start_fake: StartFake, tmp_path: Path, wait_until: WaitUntil
) -> None:
    process = start_fake(worker=["--load-gate", str(tmp_path / "never")], wait=False)
    wait_until(lambda: listens(process))
    process.terminate()
    assert process.exit_code() == 0


def listens(process: ServerProcess) -> bool:
    return any(
        it.status == "LISTEN" for it in psutil.Process(process.process.pid).net_connections()
    )


# --- the command ---


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_version_flag_prints_the_version() -> None:
    assert command("--version").stdout.strip() == f"mi-server {server.__version__}"


def test_settings_that_cannot_be_used_are_exit_code_2_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flags, reason in [
        (["--default-lambda", "2"], "--default-lambda: "),
        (["--thinking", "/no/such/place", "--instruct", "/no/such/place"], "no such directory"),
        (["--lambda-step", "0.3"], "--lambda-step"),
        (["--profile", "/no/such/profile.json"], "/no/such/profile.json"),
        (["--elastic-release", "1"], "--elastic-release: "),
    ]:
        assert main(["serve", *flags]) == 2
        printed = capsys.readouterr().err
        assert reason in printed
        assert "Traceback" not in printed
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--no-such-flag"])
    assert "--no-such-flag" in capsys.readouterr().err


def test_the_http_process_loads_no_torch(real_server: ServerProcess) -> None:
    body = real_server.chat_body("Hello?", max_tokens=1)
    assert httpx.post(f"{real_server.url}/v1/chat/completions", json=body).status_code == 200
    maps = Path(f"/proc/{real_server.process.pid}/maps").read_text()
    assert not re.search(r"libtorch|transformers", maps)
    modules = [sys.executable, "-c", "import sys, server.api.uvicorn_server; print(*sys.modules)"]
    loaded = subprocess.run(modules, cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(loaded.stdout.split())


def test_the_ready_line_reports_weights_and_peak_memory(fake_server: ServerProcess) -> None:
    description = (
        "weights 4.82 MB, 9 GB at the peak of loading; attention reference; profile neutral) at "
    )
    assert description in fake_server.output


def test_the_request_of_the_ready_message_works(fake_server: ServerProcess) -> None:
    line = re.search(r"^  curl (.*)$", fake_server.output, re.MULTILINE)
    assert line is not None
    answer = subprocess.run(
        ["bash", "-c", f"curl -s {line[1]}"], capture_output=True, text=True, check=True
    )
    assert "choices" in json.loads(answer.stdout)
