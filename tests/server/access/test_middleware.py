"""Keys, quotas and origins are checked by the headers alone, before the body is read."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.app import create_app
from server.service import Service
from server.wire.errors import Overloaded
from tests.server.chat_requests import MakeClient, WaitUntil, chat, check_error, metric

ONE, TWO = {"Authorization": "Bearer sk-one"}, {"Authorization": "Bearer sk-two"}


def rejections(client: TestClient, reason: str) -> float | None:
    return metric(client, "mi_admission_rejections_total", reason=reason)


def status_and_reads(service: Service, headers: dict[str, str]) -> tuple[int, int]:
    """Returns the status of a chat request, and how often its body was read."""
    reads, statuses = 0, []

    async def receive() -> Any:
        nonlocal reads
        reads += 1
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": raw}
    asyncio.run(create_app(service)(scope | {"query_string": b""}, receive, send))
    return statuses[0], reads


@pytest.fixture
def client_with_keys(make_client: MakeClient) -> TestClient:
    """Returns a client of an app with two API keys."""
    return make_client(api_key=["sk-one", "sk-two"])


def test_with_keys_only_monitoring_and_the_playground_are_open(
    client_with_keys: TestClient,
) -> None:
    for path in ("/health", "/ready", "/metrics", "/version", "/"):
        assert client_with_keys.get(path).status_code == 200
    for path in ("/v1/models", "/v1/models/pair", "/no/such/path", "/health/", "/docs"):
        response = client_with_keys.get(path)
        check_error(response, 401, "invalid_api_key")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    check_error(chat(client_with_keys, "say x"), 401, "invalid_api_key")
    check_error(
        chat(client_with_keys, "say x", {"Authorization": "Bearer no"}), 401, "invalid_api_key"
    )
    assert rejections(client_with_keys, "invalid_api_key") == 7


def test_every_configured_key_is_accepted(client_with_keys: TestClient) -> None:
    for key in (ONE, TWO):
        assert chat(client_with_keys, "say x", key).status_code == 200
        assert client_with_keys.get("/v1/models", headers=key).status_code == 200


def test_under_a_gateways_prefix_the_same_paths_are_open(make_client: MakeClient) -> None:
    client = make_client(api_key=["sk-one"])
    below = TestClient(client.app, root_path="/mi")
    assert below.get("/mi/version").status_code == 200
    assert below.get("/mi/v1/models").status_code == 401


def test_a_refusal_reads_no_body(make_client: MakeClient) -> None:
    client = make_client(api_key=["sk-one"], rate_limit_requests=1)
    service: Service = client.app_state["service"]
    assert status_and_reads(service, {}) == (401, 0)
    assert status_and_reads(service, ONE | {"X-Request-Timeout": "soon"}) == (400, 0)
    assert chat(client, "say x", ONE).status_code == 200
    assert status_and_reads(service, ONE) == (429, 0)
    service.draining = True
    assert status_and_reads(service, ONE) == (429, 0)


def test_a_draining_server_reads_no_body(make_client: MakeClient) -> None:
    client = make_client()
    service: Service = client.app_state["service"]
    service.draining = True
    assert status_and_reads(service, {}) == (503, 0)


def test_a_full_queue_reads_no_body(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    service: Service = make_client().app_state["service"]

    def full() -> None:
        raise Overloaded("full", retry_after=7)

    monkeypatch.setattr(service.engine, "check_room", full)
    assert status_and_reads(service, {}) == (503, 0)


def test_a_key_over_its_quota_gets_a_429_with_retry_after(make_client: MakeClient) -> None:
    client = make_client(api_key=["sk-one", "sk-two"], rate_limit_requests=2)
    for _ in range(2):
        assert chat(client, "say x", ONE, stream=True).status_code == 200
    refused = chat(client, "say x", ONE, stream=True)
    check_error(refused, 429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 120
    assert chat(client, "say x", TWO).status_code == 200
    assert client.get("/v1/models", headers=ONE).status_code == 200
    assert rejections(client, "rate_limit_exceeded") == 1


def test_tokens_of_prompts_and_answers_use_up_the_quota(make_client: MakeClient) -> None:
    prompt = chat(make_client(), "forever", max_tokens=1).json()["usage"]["prompt_tokens"]
    client = make_client(api_key=["sk-one"], rate_limit_tokens=2 * prompt + 100)
    for _ in range(2):
        assert chat(client, "forever", ONE, max_tokens=100).status_code == 200
    check_error(chat(client, "forever", ONE, max_tokens=100), 429, "rate_limit_exceeded")


def test_a_prompt_is_charged_before_its_answer_ends(
    make_client: MakeClient, wait_until: WaitUntil
) -> None:
    client = make_client(rate_limit_tokens=5)
    service: Service = client.app_state["service"]
    message = {"role": "user", "content": "forever"}
    body = {"model": "pair", "messages": [message], "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        check_error(chat(client, "say x"), 429, "rate_limit_exceeded")
    wait_until(lambda: service.engine.open_requests == 0)


def test_requests_sent_at_once_do_not_all_spend_the_same_tokens(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them have tokens left when their headers are read, before any is charged."""
    client = make_client(rate_limit_tokens=5)
    service: Service = client.app_state["service"]
    monkeypatch.setattr(service.rate_limits, "take_request", lambda caller: None)
    assert chat(client, "say x").status_code == 200
    check_error(chat(client, "say x"), 429, "rate_limit_exceeded")


def test_a_request_refused_by_a_full_engine_is_not_charged(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(rate_limit_tokens=5)
    service: Service = client.app_state["service"]

    def full(requests: Any) -> None:
        raise Overloaded("full", retry_after=7)

    with monkeypatch.context() as patch:
        patch.setattr(service.engine, "submit", full)
        check_error(chat(client, "say x"), 503, "overloaded")
    assert chat(client, "say x").status_code == 200


def test_without_keys_each_address_has_a_quota(make_client: MakeClient) -> None:
    client = make_client(rate_limit_requests=1)
    assert client.post("/v1/models").status_code == 405
    check_error(client.post("/v1/models"), 429, "rate_limit_exceeded")
    other = TestClient(client.app, client=("10.0.0.9", 1))
    assert other.post("/v1/models").status_code == 405


def test_the_cache_salt_depends_on_the_key_and_on_the_requests_own_salt(
    client_with_keys: TestClient,
) -> None:
    def salt(headers: dict[str, str], **fields: Any) -> str:
        text = chat(client_with_keys, "request", headers, **fields).json()["choices"][0]["message"][
            "content"
        ]
        found: str = json.loads(text)["cache_salt"]
        return found

    salts = [salt(ONE), salt(TWO), salt(ONE, cache_salt="x"), salt(TWO, cache_salt="x")]
    assert len(set(salts)) == 4
    assert salt(ONE, cache_salt="x") == salts[2]
    assert "sk-" not in "".join(salts)


def test_without_keys_the_cache_salt_is_the_requests_own(make_client: MakeClient) -> None:
    answer = chat(make_client(), "request", cache_salt="x").json()
    assert json.loads(answer["choices"][0]["message"]["content"])["cache_salt"] == "x"


def test_the_log_names_the_key_and_never_shows_it(
    make_client: MakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-one search team\n")
    client = make_client(api_key_file=str(file))
    with caplog.at_level("DEBUG"):
        chat(client, "say x", ONE)
        chat(client, "say x", {"Authorization": "Bearer sk-wrong"})
    lines = [it.fields for it in caplog.records if it.name == "server.ops.request_log"]
    assert lines[-2]["key"] == "search team"
    assert lines[-1]["error"] == "invalid_api_key"
    assert not [it for it in caplog.records if "sk-" in str(vars(it))]


# --- origins ---


PAGE = {"Origin": "https://page.example"}


def test_by_default_no_other_origin_may_read_answers(make_client: MakeClient) -> None:
    response = make_client().get("/v1/models", headers=PAGE)
    assert "Access-Control-Allow-Origin" not in response.headers


def test_a_configured_origin_may_send_a_preflight_and_read_refusals(
    make_client: MakeClient,
) -> None:
    client = make_client(api_key=["sk-one"], cors_origin=["https://page.example"])
    preflight = PAGE | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    allowed = client.options("/v1/chat/completions", headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == PAGE["Origin"]
    assert "authorization" in allowed.headers["Access-Control-Allow-Headers"]
    refused = chat(client, "say x", PAGE)
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == PAGE["Origin"]
    assert "X-Reasoning-Lambda" in refused.headers["Access-Control-Expose-Headers"]
    other = client.get("/version", headers={"Origin": "https://other.example"})
    assert "Access-Control-Allow-Origin" not in other.headers
