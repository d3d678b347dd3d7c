"""The page at `/` is self-contained and open, and the browser runs only its own script."""

import base64
import hashlib
import re

from starlette.testclient import TestClient

from server.api.playground import PAGE
from tests.server.chat_requests import MakeClient


def test_the_page_is_served_without_a_key(make_client: MakeClient) -> None:
    response = make_client(api_key=["secret"]).get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert response.text == PAGE.read_text()


def test_the_policy_allows_the_pages_own_script_and_nothing_from_elsewhere(
    client: TestClient,
) -> None:
    response = client.get("/")
    (script,) = re.findall(r"<script>(.*?)</script>", response.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = response.headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.findall(r"https?://|<(?:link|img|iframe)\b|\bsrc=|innerHTML", response.text)


def test_the_fields_that_the_page_sends_are_fields_of_the_api(client: TestClient) -> None:
    sent = {"reasoning_lambda", "reasoning_effort", "thinking_token_budget", "temperature"}
    fields = client.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]
    assert sent <= fields["properties"].keys()
    assert all(name in PAGE.read_text() for name in sent)
