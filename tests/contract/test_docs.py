"""The examples of `docs/dial.md` and `docs/routing.md` work as they are written."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLE = re.compile(r"```bash\n(curl .*?)```", re.DOTALL)
EXAMPLES = EXAMPLE.findall((DOCS / "dial.md").read_text())


def field_of(example: str, name: str) -> Any:
    body = re.search(r"-d '(.*)'", example, re.DOTALL)
    assert body is not None
    return json.loads(body[1]).get(name)


def run(example: str, server: Any) -> Any:
    command = example.replace("http://127.0.0.1:8000", server.url)
    command = command.replace('"mi-embedded"', '"pair"')
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_every_form_of_the_dial_has_its_example() -> None:
    forms = [type(field_of(example, "reasoning_lambda")) for example in EXAMPLES]
    assert {float, dict, list} <= set(forms)
    assert any(field_of(example, "answer_lambda") is not None for example in EXAMPLES)
    assert any(field_of(example, "thinking_token_budget") is not None for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_works(real_server: Any, example: str) -> None:
    answer = run(example, real_server)
    assert answer["routing"]["reasoning_lambda"] == field_of(example, "reasoning_lambda")
    assert all("Answer: " in choice["message"]["content"] for choice in answer["choices"])
    if field_of(example, "thinking_token_budget"):
        assert answer["routing"]["forced_close"] is True


SOURCES = {
    "thinking_token_budget": "budget",
    "reasoning_effort": "effort",
    "enable_thinking": "enable_thinking",
}


def test_the_examples_of_routing_work(real_server: Any) -> None:
    *chats, profiles = EXAMPLE.findall((DOCS / "routing.md").read_text())
    assert run(profiles, real_server)["classes"]["default"]["points"]
    assert len(chats) == len(SOURCES)
    for example, (field, source) in zip(chats, SOURCES.items(), strict=True):
        answer = run(example, real_server)
        assert answer["routing"]["source"] == source
        assert answer["routing"].get("cap") == field_of(example, "thinking_token_budget")
        assert field_of(example, field) is not None
        assert "Answer: " in answer["choices"][0]["message"]["content"]


README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_transcript_of_the_readme_is_what_the_server_says(real_server: Any) -> None:
    found = re.search(r"```\n\$ (for value.*?done)\n(.*?)```", README, re.DOTALL)
    assert found is not None
    command, told = found.groups()
    command = command.replace("http://127.0.0.1:8000", real_server.url)
    command = command.replace('"mi-embedded"', '"pair"')
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    contents = [answer["choices"][0]["message"]["content"] for answer in answers]
    tokens = [str(answer["usage"]["completion_tokens"]) for answer in answers]
    assert contents == re.findall(r'"content":"(Answer: \d)"', told)
    assert tokens == re.findall(r'"completion_tokens":(\d+)', told)
