"""The server works as operators run it: with keys, TLS, JSON logs, hanging engines and proxies."""

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.contract.conftest import ROOT, ServerProcess, StartFake, wait_until


def stream_lines(process: ServerProcess, content: str, **fields: Any) -> Iterator[str]:
    body = process.chat_body(content, stream=True, **fields)
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{process.url}/v1/chat/completions", json=body) as response,
    ):
        assert response.status_code == 200
        yield from (line for line in response.iter_lines() if line)


def error_code(line: str) -> str:
    error: str = json.loads(line.removeprefix("data: "))["error"]["code"]
    return error


# --- an engine that hangs ---


def test_a_hung_engine_ends_every_stream_and_the_server(start_fake: StartFake) -> None:
    process = start_fake("--engine-timeout", "1.5")
    waiting, wedged = stream_lines(process, "wait"), stream_lines(process, "wedge")
    next(waiting)
    *_, last = wedged
    assert error_code(last) == "engine_dead"
    health = process.get("/health")
    assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")
    assert error_code(list(waiting)[-1]) == "engine_dead"
    assert process.exit_code() == 1
    assert "The engine process hung" in process.output


def test_a_hung_engine_does_not_prolong_the_drain(start_fake: StartFake) -> None:
    process = start_fake("--drain-timeout", "0.3")
    lines = stream_lines(process, "wedge")
    next(lines)
    process.terminate()
    *_, last = lines
    assert error_code(last) == "draining"
    assert process.exit_code() == 0


def test_deadlines_are_kept_while_draining(start_fake: StartFake) -> None:
    process = start_fake("--request-timeout", "3", "--drain-timeout", "60")
    lines = stream_lines(process, "wait")
    next(lines)
    process.terminate()
    *_, last = lines
    assert error_code(last) == "deadline_exceeded"
    assert process.exit_code() == 0


# --- logs ---


def test_json_logs_have_one_object_a_line(start_fake: StartFake) -> None:
    process = start_fake("--log-format", "json", wait=False)
    wait_until(lambda: '"event": "Ready"' in process.output)
    (ready,) = [json.loads(line) for line in process.output.splitlines()]
    process.url = ready["address"]
    answer = httpx.post(f"{process.url}/v1/chat/completions", json=process.chat_body("say x"))
    httpx.post(f"{process.url}/v1/chat/completions", content="{")
    process.terminate()
    assert process.exit_code() == 0
    lines = [json.loads(line) for line in process.output.splitlines()]
    requests = [it for it in lines if it["logger"] == "server.ops.request_log"]
    assert [it["status"] for it in requests] == [200, 400]
    assert requests[0]["id"] == answer.headers["X-Request-Id"]
    stages = {"prepare_s", "queue_s", "prefill_s", "first_token_s", "decode_s", "total_s"}
    assert stages <= set(requests[0])
    assert requests[0]["finish"] == "stop"
    assert requests[1]["error"] == "invalid_request_error"
    assert "Received SIGTERM, draining" in [it["event"] for it in lines]


# --- keys ---


def test_api_keys_from_a_file_never_appear_in_output(start_fake: StartFake, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-hidden team\n")
    process = start_fake("--api-key-file", str(file), "--log-level", "debug")
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="sk-hidden") as client:
        assert client.models.list().data
    with (
        openai.OpenAI(base_url=f"{process.url}/v1", api_key="sk-no") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    wait_until(lambda: "key=team" in process.output)
    assert "-H 'Authorization: Bearer KEY'" in process.output  # in the request that it suggests
    assert "sk-" not in process.output


def test_keys_that_cannot_be_used_are_exit_code_2(start_fake: StartFake, tmp_path: Path) -> None:
    process = start_fake("--api-key-file", str(tmp_path / "none"), wait=False)
    assert process.exit_code() == 2
    assert "--api-key-file" in process.output
    assert "Traceback" not in process.output


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_cached_tokens_count_only_prompts_of_the_same_salt(
    path: str, real_server: ServerProcess
) -> None:
    """The salt of a tenant contains its key, as `tests/server/access` tests."""
    question = "a=6,b=a-2,c=b+6,d=c-3,e=d+1,f=e-2. f?"
    prompts = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": question}]},
        "/v1/completions": {"prompt": question},
    }

    def cached_tokens(salt: str) -> int:
        body = {"model": "pair", "max_tokens": 2, "cache_salt": salt} | prompts[path]
        answer = httpx.post(real_server.url + path, json=body, timeout=60)
        cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    assert cached_tokens("one") == 0
    assert cached_tokens("one") > 0
    assert cached_tokens("two") == 0
    assert cached_tokens("two") > 0
    assert cached_tokens("") == 0


# --- TLS ---


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Returns the files of a certificate for 127.0.0.1 and of its key."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"]
    command += ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_with_a_certificate_the_server_uses_tls(
    start_fake: StartFake, certificate: tuple[Path, Path]
) -> None:
    flags = ["--ssl-certfile", str(certificate[0]), "--ssl-keyfile", str(certificate[1])]
    process = start_fake(*flags, wait=False)
    wait_until(lambda: "https://" in process.output)
    url = next(line.split()[-1] for line in process.output.splitlines() if "Ready" in line)
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    assert httpx.get(f"{url}/health", verify=trusted).status_code == 200


def test_a_bad_certificate_is_exit_code_2(start_fake: StartFake, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    process = start_fake("--ssl-certfile", str(tmp_path / "cert.pem"), wait=False)
    assert process.exit_code() == 2
    assert "--ssl-" in process.output
    assert "Traceback" not in process.output


# --- traces ---


def without_opentelemetry(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        f"from server.cli import main; sys.exit(main({['serve', *arguments]!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_traces_without_their_packages_are_exit_code_2_with_advice() -> None:
    ended = without_opentelemetry("--otlp-traces-endpoint", "http://127.0.0.1:9/v1/traces")
    assert ended.returncode == 2
    assert "pip install 'mi-server[otel]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_traces_no_sdk_of_opentelemetry_is_imported() -> None:
    """Its API may be imported, as FastAPI does that if it is installed."""
    program = "import sys, server.api.uvicorn_server, server.cli; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "server.service" in loaded.split()
    assert not {"opentelemetry.sdk", "opentelemetry.exporter", "requests"} & set(loaded.split())


# --- proxies ---


def test_x_forwarded_for_is_used_only_from_trusted_proxies(
    start_fake: StartFake,
) -> None:
    def statuses(process: ServerProcess) -> list[int]:
        """Returns the statuses of two requests with different forwarded addresses."""
        return [
            httpx.post(f"{process.url}/v1/models", headers={"X-Forwarded-For": address}).status_code
            for address in ("10.0.0.1", "10.0.0.2")
        ]

    limit = ("--rate-limit-requests", "1")
    assert statuses(start_fake(*limit)) == [405, 429]
    assert statuses(start_fake(*limit, "--forwarded-allow-ips", "127.0.0.1")) == [405, 405]
