"""Every field of every body has an effect, except those documented as accepted without effect.

A request is sent twice, without the field and with it. The two must differ in the answer, in what
the engine receives, or in the log line. `tests/runtime/test_request_fields.py` tests whether the
engine uses what it receives. A new field without a case here fails.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from mi_runtime.embedded_pair.tokenizer import save_tokenizer
from mi_runtime.request import EngineRequest
from server.service import Service
from server.wire.openapi import OPERATIONS
from tests.server.conftest import open_client
from tests.server.measured_profile import measured_profile

CHAT, TEXT, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
ROOT = Path(__file__).parents[3]
TEMPLATE_OF_EVERYTHING = """\
{{ messages | tojson }}{{ tools | tojson }}<|im_start|>user
{{ messages[-1].content }}<|im_end|>{{ add_generation_prompt }}"""


@dataclass(frozen=True)
class Case:
    """A value of a field, and the other fields that it needs, which both requests have."""

    value: Any
    others: dict[str, Any] = field(default_factory=dict)
    refused: bool = False  # its effect is that the request is refused


THOUGHT = "say <think>\nso\n</think>\n\nhi"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NOT_ENFORCED = {"type": "object", "not": {"required": ["b"]}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def before(message: dict[str, Any]) -> dict[str, Any]:
    """Returns the field `messages` with this message before the last one."""
    return {"messages": [message, user("say hi")]}


def tools(**fields: Any) -> dict[str, Any]:
    functions = [{"name": "f", "parameters": SCHEMA, **fields}, {"name": "g"}]
    return {"tools": [{"type": "function", "function": it} for it in functions]}


def as_schema(**fields: Any) -> dict[str, Any]:
    schema = {"name": "x", "schema": SCHEMA, **fields}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = before({"role": "assistant", "content": "x", "tool_calls": [CALL]})
CHOSEN = {"tool_choice": {"type": "function", "function": {"name": "f"}}}
GROUPS = {"reasoning_lambda": {"default": 0.5}}
LAYER = {"reasoning_lambda": {"default": 0.5, "layers": {"0": {"attn": 0.4, "mlp": 0.4}}}}
STREAM = {"stream": True}

OF_ANY = {
    "model": Case("pair@0.3"),
    "reasoning_lambda": Case(0.3),
    "reasoning_lambda.default": Case(0.4, GROUPS),
    "reasoning_lambda.attn": Case(0.4, GROUPS),
    "reasoning_lambda.mlp": Case(0.4, GROUPS),
    "reasoning_lambda.embed": Case(0.4, GROUPS),
    "reasoning_lambda.head": Case(0.4, GROUPS),
    "reasoning_lambda.layers": Case({"0-1": 0.4}, GROUPS),
    "reasoning_lambda.layers.0.attn": Case(0.1, LAYER),
    "reasoning_lambda.layers.0.mlp": Case(0.1, LAYER),
    "reasoning_effort": Case("low"),
    "reasoning.effort": Case("low"),
    "reasoning.enabled": Case(False),
    "thinking.type": Case("disabled", {"thinking": {"type": "enabled"}}),
    "enable_thinking": Case(False),
    "chat_template_kwargs.enable_thinking": Case(False),
    "routing_class": Case("math", {"reasoning_effort": "low"}),
    "max_tokens": Case(2),
    "min_tokens": Case(2),
    "temperature": Case(0.5),
    "top_p": Case(0.5),
    "top_k": Case(5),
    "min_p": Case(0.5),
    "repetition_penalty": Case(1.5),
    "presence_penalty": Case(1.5),
    "frequency_penalty": Case(1.5),
    "logit_bias": Case({"3": 1.5}),
    "seed": Case(1),
    "n": Case(2),
    "stop": Case(["i", "a"]),
    "stop_token_ids": Case([3]),
    "ignore_eos": Case(True, {"max_tokens": 5}),
    "stream": Case(True),
    "stream_options.include_usage": Case(True, STREAM),
    "stream_options.include_obfuscation": Case(False, STREAM),
    "priority": Case(1),
    "cache_salt": Case("x"),
    "user": Case("x"),
    "metadata": Case({"a": "b"}),
}
OF_CHAT = OF_ANY | {
    "answer_lambda": Case(0.3),
    "thinking_token_budget": Case(10),
    "thinking_budget": Case(10),
    "thinking.budget_tokens": Case(10, {"thinking": {"type": "enabled"}}),
    "reasoning.max_tokens": Case(10),
    "reasoning.exclude": Case(True, {"messages": [user(THOUGHT)]}),
    "include_reasoning": Case(False, {"messages": [user(THOUGHT)]}),
    "messages.0.role": Case("system", before(user("x"))),
    "messages.0.content": Case("y", before(user("x"))),
    "messages.0.content.0.text": Case("y", before(user([{"type": "text", "text": "x"}]))),
    "messages.0.name": Case("Ann", before(user("x"))),
    "messages.0.reasoning_content": Case("so", before({"role": "assistant", "content": "x"})),
    "messages.0.reasoning": Case("so", before({"role": "assistant", "content": "x"})),
    "messages.0.tool_calls.0.id": Case("d", CALLING),
    "messages.0.tool_calls.0.function.name": Case("g", CALLING),
    "messages.0.tool_calls.0.function.arguments": Case('{"a": 1}', CALLING),
    "messages.0.tool_call_id": Case(
        "d", before({"role": "tool", "content": "x", "tool_call_id": "c"})
    ),
    "continue_final_message": Case(
        True, {"messages": [user("x"), {"role": "assistant", "content": "y"}]}
    ),
    "add_generation_prompt": Case(False),
    "max_completion_tokens": Case(2),
    "logprobs": Case(True),
    "top_logprobs": Case(2, {"logprobs": True}),
    "tools.0.function.name": Case("h", tools()),
    "tools.0.function.description": Case("adds", tools()),
    "tools.0.function.parameters": Case({"type": "object"}, tools()),
    "tools.0.function.strict": Case(True, tools()),
    "tool_choice": Case("none", tools()),
    "tool_choice.function.name": Case("g", tools() | CHOSEN),
    "parallel_tool_calls": Case(False, tools() | {"tool_choice": "required"}),
    "response_format.type": Case("json_object", {"response_format": {"type": "text"}}),
    "response_format.json_schema.schema": Case({"type": "object"}, as_schema()),
    "response_format.json_schema.strict": Case(True, as_schema(schema=NOT_ENFORCED), refused=True),
    "response_format.json_schema.name": Case("y", as_schema()),
    "response_format.json_schema.description": Case("y", as_schema()),
    "store": Case(True),
    "service_tier": Case("x"),
    "verbosity": Case("x"),
    "safety_identifier": Case("x"),
    "prompt_cache_key": Case("x"),
}
OF_TEXT = OF_ANY | {
    "answer_lambda": Case(0.3, refused=True),
    "thinking_token_budget": Case(10, refused=True),
    "thinking_budget": Case(10, refused=True),
    "thinking.budget_tokens": Case(10, {"thinking": {"type": "enabled"}}, refused=True),
    "reasoning.max_tokens": Case(10, refused=True),
    "reasoning.exclude": Case(True, refused=True),
    "prompt": Case("say ho"),
    "add_special_tokens": Case(False),
    "echo": Case(True),
    "logprobs": Case(2),
    "best_of": Case(2, refused=True),
}
MESSAGES = {"messages": [user("x")], "prompt": None}
OF_TOKENIZE = {
    path: replace(case, others=MESSAGES | case.others)
    for path, case in OF_CHAT.items()
    if path.startswith("messages.") or path == "continue_final_message"
} | {
    "model": Case("pair@0.0", MESSAGES),
    "prompt": Case("ho"),
    "reasoning_lambda": Case(0.0, MESSAGES),
    "add_special_tokens": Case(False),
    "add_generation_prompt": Case(False, MESSAGES),
    "return_token_strs": Case(True),
}
CASES = {
    CHAT: OF_CHAT,
    TEXT: OF_TEXT,
    TOKENIZE: OF_TOKENIZE,
    "/detokenize": {"model": Case("other", refused=True), "tokens": Case([80])},
}
SMALLEST: dict[str, dict[str, Any]] = {
    CHAT: {"model": "pair", "messages": [user("say hi")]},
    TEXT: {"model": "pair", "prompt": "say hi"},
    TOKENIZE: {"prompt": "hi"},
    "/detokenize": {"tokens": [81]},
}


# --- the fields ---


def paths_of(model: type[BaseModel], start: str = "") -> Iterator[str]:
    """Yields the paths of the fields that have several values, such as `messages.0.role`."""
    for name, info in model.model_fields.items():
        yield from paths_in(info.annotation, start + (info.alias or name))


def paths_in(annotation: Any, path: str) -> Iterator[str]:
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Annotated:
            yield from paths_in(arguments[0], path)
        case origin if origin in (Union, UnionType):
            for one in arguments:
                yield from paths_in(one, path)
        case origin if origin in (list, dict):
            inner = {*paths_in(arguments[-1], f"{path}.0")}
            yield from {path if one == f"{path}.0" else one for one in inner}
        case origin if origin is Literal:
            yield from [path] if len(arguments) > 1 else []
        case _ if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from paths_of(annotation, f"{path}.")
        case _ if annotation is not NoneType:
            yield path


FIELDS = sorted(
    {
        (operation.path, path)
        for operation in OPERATIONS
        if operation.body is not None
        for path in paths_of(operation.body)
    }
)


def without_effect() -> set[str]:
    """Returns the fields that docs/architecture.md lists as accepted without effect."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.search(r"^7\. A field that the server accepts .*?\n\n", page, re.S | re.M)
    assert listed is not None
    names = re.findall(r"`([\w.]+)`", listed[0])
    whole = [name for name in names if not name.startswith(".")]
    start = whole[-1].rpartition(".")[0]  # of those that are given by their end
    return {*whole, *(start + name for name in names if name.startswith("."))}


WITHOUT_EFFECT = without_effect()


# --- what a request does ---


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an endpoint whose template writes all its input, and which adds a special token."""
    directory = tmp_path_factory.mktemp("endpoint")
    save_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE_OF_EVERYTHING)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [315, 317]}))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    first = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first[0]} $A", pair=f"{first[0]} $A $B", special_tokens=[first]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def client(
    endpoint: Path, make_service: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    measured_profile().save(file)
    service = make_service(thinking=str(endpoint), profile=str(file), prefix_caching=False)
    with open_client(service) as one:
        yield one


@pytest.fixture
def send(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[int, Any]]:
    """Sends a request, and returns its status and all its effects, without ids and times."""
    engine, requests = client.app_state["service"].engine, list[EngineRequest]()
    submit = engine.submit

    def noting(submitted: list[EngineRequest]) -> Any:
        requests.extend(replace(one, request_id="") for one in submitted)
        return submit(submitted)

    monkeypatch.setattr(engine, "submit", noting)

    def send_and_observe(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        requests.clear()
        caplog.clear()
        with caplog.at_level("INFO"):
            response = client.post(path, json=body)
        answer = re.sub(r'"(id|created)": ?("[^"]*"|\d+)', "", response.text)
        (fields,) = [it.fields for it in caplog.records if it.name == "server.ops.request_log"]
        logged = {name: it for name, it in fields.items() if name != "id" and name[-2:] != "_s"}
        return response.status_code, (answer, list(requests), logged)

    return send_and_observe


def with_field(body: Any, path: str, value: Any) -> Any:
    changed = copy.deepcopy(body)
    *parents, last = path.split(".")
    inside = changed
    for name in parents:
        inside = inside[int(name)] if isinstance(inside, list) else inside.setdefault(name, {})
    inside[last] = value
    return changed


@pytest.mark.parametrize(("route", "path"), FIELDS)
def test_every_field_has_an_effect_or_is_listed_as_without_one(
    route: str, path: str, send: Callable[..., tuple[int, Any]]
) -> None:
    case = CASES[route][path]
    body = SMALLEST[route] | case.others
    status, expected = send(route, body)
    changed_status, changed = send(route, with_field(body, path, case.value))
    assert status == 200, expected
    assert changed_status == 200 or case.refused, changed
    assert (changed == expected) is (path in WITHOUT_EFFECT)


def test_only_fields_are_listed_as_without_effect() -> None:
    assert {path for _, path in FIELDS} >= WITHOUT_EFFECT
    assert len(WITHOUT_EFFECT) == 8
