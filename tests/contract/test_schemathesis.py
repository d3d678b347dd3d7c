"""Every answer to generated requests is one that the OpenAPI document describes.

There are three sources of requests: the document as it is, with valid and invalid data; the same
document narrowed to what the server accepts, so that most requests are answered; and bodies and
headers that no schema would generate. A 5xx, or a status, type, header or body that the document
does not describe, is a failure. `make test-long` sends ten times as many requests, and tests each
bound of each field.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.config import (
    CoveragePhaseConfig,
    PhasesConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.wire.openapi import document
from tests.contract.conftest import ServerProcess
from tests.examples import examples, is_long_run

pytestmark = pytest.mark.hypothesis
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# Each bound of each field, one at a time: a thousand requests.
PHASES = PhasesConfig(coverage=CoveragePhaseConfig(enabled=is_long_run()))
GENERATED = settings(max_examples=examples(40), suppress_health_check=list(HealthCheck))
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server(
    pair_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Starts a server on the fake engine, with a short context."""
    log = tmp_path_factory.mktemp("schema") / "server.log"
    worker = ("--context", "320", "--step-seconds", "0")
    process = ServerProcess.of_fake_engine(log, pair_directory, worker=worker)
    try:
        yield process.wait_ready()
    finally:
        process.stop()


def configured(phases: PhasesConfig | None = None, **project: int) -> SchemathesisConfig:
    default = ProjectConfig(phases=phases, **project)
    return SchemathesisConfig(projects=ProjectsConfig(default=default))


# --- the document as it is -----------------------------------------------------------------------


def described() -> dict[str, Any]:
    """Returns the document with the served model names, as any other would only be a 404."""
    it = copy.deepcopy(document("1"))
    for schema in it["components"]["schemas"].values():
        if schema["title"].endswith("Request"):
            may_be_left_out = "model" not in schema.get("required", ())
            names = ["pair", "pair@0.3"]
            schema["properties"]["model"] = {"enum": [*names, None] if may_be_left_out else names}
    return it


DOCUMENT = described()
OPERATIONS = schemathesis.openapi.from_dict(DOCUMENT, config=configured(PHASES))


@OPERATIONS.parametrize()
@GENERATED
def test_every_answer_is_described_and_invalid_data_refused(
    case: schemathesis.Case, server: ServerProcess
) -> None:
    response = case.call(base_url=server.url)
    case.validate_response(response, checks=[*CHECKS, negative_data_rejection])


# --- what the server accepts ---------------------------------------------------------------------

LAMBDA = {"type": "number", "minimum": 0, "maximum": 1}
TOKEN = {"type": "integer", "minimum": 0, "maximum": 150}
ARGUMENTS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": ARGUMENTS}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
THOUGHT = "say <think>\nso\n</think>\n\nhi"
WORDS = {"enum": ["hi", "say hi", "say a\nb", THOUGHT, "say <think>", "forever", "request", "λ🙂"]}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "assistant", "content": "ho", "reasoning_content": "so"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "1"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
]
LAST_MESSAGE = {
    "type": "object",
    "properties": {"role": {"const": "user"}, "content": WORDS},
    "required": ["role", "content"],
    "additionalProperties": False,
}
OF_ANY_ANSWER = {
    "model": {"const": "pair"},
    "stream": {"type": "boolean"},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 12},
    "min_tokens": {"enum": [0, 1]},
    "n": {"type": "integer", "minimum": 1, "maximum": 3},
    "reasoning_lambda": {
        "anyOf": [
            LAMBDA,
            {"enum": [{"default": 0.5}, {"default": 0, "layers": {"0-1": 1, "3": {"attn": 0.2}}}]},
            {"type": "array", "items": LAMBDA, "minItems": 1, "maxItems": 3},
        ]
    },
    "logit_bias": {"enum": [{}, {"3": 1.5, "90": -100}]},
    "stop": {"enum": ["hi", ["a", "\n"], []]},
    "stop_token_ids": {"type": "array", "items": TOKEN, "maxItems": 3},
    "stream_options": {"enum": [{"include_usage": True}, {"include_obfuscation": False}]},
    "cache_salt": {"enum": ["", "mine"]},
    "metadata": {"enum": [{}, {"a": "b"}]},
}
OF_CHATS = OF_ANY_ANSWER | {
    "messages": {"type": "array", "items": {"enum": TURNS}, "maxItems": 3},
    "answer_lambda": LAMBDA,
    "thinking_budget": {"type": "integer", "minimum": -1, "maximum": 12},
    "tools": {"const": [TOOL]},
    "response_format": {
        "enum": [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": ARGUMENTS}},
        ]
    },
    "last": LAST_MESSAGE,  # which `consistent` appends to the messages
}
OF_TEXTS = OF_ANY_ANSWER | {
    "prompt": {
        "anyOf": [
            WORDS,
            {"type": "array", "items": WORDS, "minItems": 1, "maxItems": 3},
            {"type": "array", "items": TOKEN, "minItems": 1, "maxItems": 9},
            {"enum": [[[1, 2], [3]], [[4]]]},
        ]
    }
}
CONFLICTING = {
    *("thinking_token_budget", "thinking", "reasoning", "reasoning_effort", "enable_thinking"),
    *("chat_template_kwargs", "max_completion_tokens", "continue_final_message", "tool_choice"),
    "best_of",
}
"""Fields that most others exclude; the document as it is has them."""

ALWAYS = ("model", "max_tokens", "stream")


def narrowed(name: str, fields: dict[str, Any], *required: str) -> dict[str, Any]:
    schema = DOCUMENT["components"]["schemas"][name]
    kept = {key: it for key, it in schema["properties"].items() if key not in CONFLICTING}
    return schema | {"properties": kept | fields, "required": [*ALWAYS, *required]}


def narrowed_document() -> dict[str, Any]:
    it = copy.deepcopy(DOCUMENT)
    it["paths"] = {path: it["paths"][path] for path in (CHAT, TEXT)}
    schemas = it["components"]["schemas"]
    schemas["ChatRequest"] = narrowed("ChatRequest", OF_CHATS, "messages", "last")
    schemas["CompletionRequest"] = narrowed("CompletionRequest", OF_TEXTS, "prompt")
    return it


def as_a_client_sends_it(value: Any) -> Any:
    """Writes 2.0 as 2: they are the same in JSON, but not for the server."""
    if isinstance(value, dict):
        return {key: as_a_client_sends_it(it) for key, it in value.items()}
    if isinstance(value, list):
        return [as_a_client_sends_it(it) for it in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def consistent(body: Any) -> Any:
    """Leaves out fields that others exclude, which a schema cannot express."""
    body = as_a_client_sends_it(body)
    if not body.get("stream"):
        body.pop("stream_options", None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    if isinstance(body.get("reasoning_lambda"), list):
        body.pop("n", None)
    if "last" in body:
        body["messages"] = [*body["messages"], body.pop("last")]
    return body


ACCEPTED = schemathesis.openapi.from_dict(
    narrowed_document(), config=configured(max_stream_events=10_000)
)


def ends_as_a_stream_does(text: str) -> bool:
    return text.endswith("}\n\ndata: [DONE]\n\n") and text.count("[DONE]") == 1


def send_accepted(server: ServerProcess, path: str, requests: int) -> tuple[set[str], float]:
    """Returns the fields that were sent, and the share of requests that got an answer."""
    fields: set[str] = set()
    statuses: list[int] = []

    @settings(GENERATED, max_examples=requests)
    @given(case=ACCEPTED[path]["POST"].as_strategy())
    def ask(case: schemathesis.Case) -> None:
        case.body = consistent(case.body)
        case.headers = {}
        response = case.call(base_url=server.url)
        case.validate_response(response, checks=CHECKS)
        if response.headers["content-type"][0].startswith("text/event-stream"):
            assert ends_as_a_stream_does(response.text)
        statuses.append(response.status_code)
        fields.update(case.body)

    ask()
    return fields, statuses.count(200) / len(statuses)


@pytest.mark.parametrize(("path", "model"), [(CHAT, "ChatRequest"), (TEXT, "CompletionRequest")])
def test_valid_requests_get_responses_that_match_the_schema(
    path: str, model: str, server: ServerProcess
) -> None:
    fields, answered = send_accepted(server, path, examples(160))
    possible = narrowed_document()["components"]["schemas"][model]["properties"]
    assert fields == set(possible) - {"last"}
    assert answered > 0.7


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_real_engine_answers_as_described(path: str, real_server: ServerProcess) -> None:
    _, answered = send_accepted(real_server, path, examples(30))
    assert answered > 0.7
    assert real_server.get("/ready").status_code == 200
    assert "Traceback" not in real_server.output


# --- what no schema would make -------------------------------------------------------------------

GOOD = json.dumps({"model": "pair", "messages": [{"role": "user", "content": "hi"}]}).encode()
CUT_AND_PASTED = st.builds(
    lambda start, middle, end: GOOD[:start] + middle + GOOD[end:],
    st.integers(0, len(GOOD)),
    st.binary(max_size=8),
    st.integers(0, len(GOOD)),
)
LATIN_1 = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_categories=["Cc"]), max_size=30
)
ODD_NUMBERS = st.sampled_from(
    ["nan", "-inf", "1e999", "0x1", "1_0", "\xb2", "-0", "", ".5", "1" * 400]
)
ODD_HEADERS = (
    *("Content-Type", "Accept", "Accept-Encoding", "Authorization", "Origin", "Cookie"),
    *("X-Reasoning-Lambda", "X-Request-Timeout", "X-Request-Id", "X-Forwarded-For"),
    *("traceparent", "tracestate", "Range", "Referer", "Content-Encoding"),
)
HEADERS = st.fixed_dictionaries({}, optional=dict.fromkeys(ODD_HEADERS, LATIN_1 | ODD_NUMBERS))
PATHS = st.sampled_from([CHAT, TEXT, "/tokenize", "/detokenize"])
REFUSAL = jsonschema.Draft202012Validator(
    {"$ref": "#/components/schemas/Error", "components": DOCUMENT["components"]}
)


def test_odd_bytes_and_headers_get_a_described_answer(server: ServerProcess) -> None:
    statuses: set[int] = set()

    @settings(GENERATED, max_examples=examples(200))
    @given(path=PATHS, body=CUT_AND_PASTED | st.binary(max_size=40), headers=HEADERS)
    def ask(path: str, body: bytes, headers: dict[str, str]) -> None:
        raw = [(name, value.encode("latin-1")) for name, value in headers.items()]
        response = client.post(path, content=body, headers=raw)
        assert response.status_code < 500
        assert str(response.status_code) in DOCUMENT["paths"][path]["post"]["responses"]
        if response.status_code != 200:
            REFUSAL.validate(response.json())
        statuses.add(response.status_code)

    with httpx.Client(base_url=server.url, timeout=60) as client:
        ask()
    assert {200, 400} <= statuses


def test_fuzzing_leaves_no_traceback_and_no_open_request(
    server: ServerProcess,
) -> None:
    assert "Traceback" not in server.output
    assert server.get("/ready").status_code == 200
    assert server.gauge("mi_num_requests_running") == 0
