"""The examples of `docs/structured-output.md` work as they are written."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text()
EXAMPLES = re.findall(r"```bash\n(curl .*?)```", PAGE, re.DOTALL)


def body_of(example: str) -> dict[str, Any]:
    body = re.search(r"-d '(.*)'", example, re.DOTALL)
    assert body is not None
    fields: dict[str, Any] = json.loads(body[1])
    return fields


def test_formats_and_tools_have_examples() -> None:
    assert {"response_format", "tools"} <= {field for it in EXAMPLES for field in body_of(it)}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_works(real_server: Any, example: str) -> None:
    command = example.replace("http://127.0.0.1:8000", real_server.url)
    command = command.replace('"mi-embedded"', '"pair"')
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    message = json.loads(done.stdout)["choices"][0]["message"]
    body = body_of(example)
    if "tools" in body:
        function = body["tools"][0]["function"]
        (call,) = message["tool_calls"]
        assert call["function"]["name"] == function["name"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), function["parameters"])
    else:
        schema = body["response_format"]["json_schema"]["schema"]
        jsonschema.validate(json.loads(message["content"]), schema)


def test_the_limits_are_those_of_the_code() -> None:
    from server.text.grammar_builder import LARGEST_GRAMMAR, LARGEST_SCHEMA
    from server.wire.tools import MOST_TOOLS

    told = f"At most {MOST_TOOLS} tools, each schema {LARGEST_SCHEMA // 1024} KiB, all together"
    assert f"{told} {LARGEST_GRAMMAR // 1024} KiB" in PAGE
