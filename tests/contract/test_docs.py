"""The examples of the pages work as they are written, and the README shows real answers."""

import json
import re

import jsonschema
import pytest

from tests.contract.conftest import ServerProcess
from tests.contract.page_examples import answer_to, body_of, examples_of, output_of, page

DIAL = examples_of("docs/dial.md")
STRUCTURED_OUTPUT = examples_of("docs/structured-output.md")


# --- docs/dial.md and docs/routing.md ---


def test_every_form_of_the_dial_has_its_example() -> None:
    bodies = [body_of(example) for example in DIAL]
    assert {float, dict, list} <= {type(body.get("reasoning_lambda")) for body in bodies}
    for field in ("answer_lambda", "thinking_token_budget"):
        assert any(body.get(field) is not None for body in bodies)


@pytest.mark.parametrize("example", DIAL)
def test_an_example_of_the_dial_works(real_server: ServerProcess, example: str) -> None:
    answer, body = answer_to(example, real_server), body_of(example)
    assert answer["routing"]["reasoning_lambda"] == body.get("reasoning_lambda")
    assert all("Answer: " in choice["message"]["content"] for choice in answer["choices"])
    if body.get("thinking_token_budget"):
        assert answer["routing"]["forced_close"] is True


SOURCES = {
    "thinking_token_budget": "budget",
    "reasoning_effort": "effort",
    "enable_thinking": "enable_thinking",
}


def test_the_examples_of_routing_work(real_server: ServerProcess) -> None:
    *chats, profiles = examples_of("docs/routing.md")
    assert answer_to(profiles, real_server)["classes"]["default"]["points"]
    assert len(chats) == len(SOURCES)
    for example, (field, source) in zip(chats, SOURCES.items(), strict=True):
        answer, body = answer_to(example, real_server), body_of(example)
        assert answer["routing"]["source"] == source
        assert answer["routing"].get("cap") == body.get("thinking_token_budget")
        assert body[field] is not None
        assert "Answer: " in answer["choices"][0]["message"]["content"]


# --- docs/structured-output.md ---


def test_formats_and_tools_have_examples() -> None:
    fields = {field for example in STRUCTURED_OUTPUT for field in body_of(example)}
    assert {"response_format", "tools"} <= fields


@pytest.mark.parametrize("example", STRUCTURED_OUTPUT)
def test_an_example_of_structured_output_works(real_server: ServerProcess, example: str) -> None:
    message = answer_to(example, real_server)["choices"][0]["message"]
    body = body_of(example)
    if "tools" in body:
        function = body["tools"][0]["function"]
        (call,) = message["tool_calls"]
        assert call["function"]["name"] == function["name"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), function["parameters"])
    else:
        schema = body["response_format"]["json_schema"]["schema"]
        jsonschema.validate(json.loads(message["content"]), schema)


# --- docs/api.md and the README ---


@pytest.mark.parametrize("example", examples_of("docs/api.md"))
def test_an_example_of_the_reference_works(real_server: ServerProcess, example: str) -> None:
    answer = answer_to(example, real_server)
    assert answer["choices"]
    assert all(choice["finish_reason"] for choice in answer["choices"])


def test_the_transcript_of_the_readme_is_what_the_server_answers(
    real_server: ServerProcess,
) -> None:
    found = re.search(r"```\n\$ (for value.*?done)\n(.*?)```", page("README.md"), re.DOTALL)
    assert found is not None
    command, transcript = found.groups()
    answers = [json.loads(line) for line in output_of(command, real_server).splitlines()]
    contents = [answer["choices"][0]["message"]["content"] for answer in answers]
    tokens = [str(answer["usage"]["completion_tokens"]) for answer in answers]
    assert contents == re.findall(r'"content":"(Answer: \d)"', transcript)
    assert tokens == re.findall(r'"completion_tokens":(\d+)', transcript)
