"""The `curl` examples of a page of docs/, run against a test's server."""

import json
import re
import subprocess
from typing import Any

from tests.contract.conftest import ROOT, ServerProcess


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def examples_of(name: str) -> list[str]:
    """Returns the commands of a page that begin with `curl`."""
    return re.findall(r"```bash\n(curl .*?)```", page(name), re.DOTALL)


def body_of(example: str) -> dict[str, Any]:
    """Returns the request body of an example."""
    body = re.search(r"-d '(.*)'", example, re.DOTALL)
    assert body is not None
    fields: dict[str, Any] = json.loads(body[1])
    return fields


def output_of(command: str, server: ServerProcess) -> str:
    """Returns what a command prints when it talks to `server` in place of the page's server."""
    command = command.replace("http://127.0.0.1:8000", server.url)
    command = command.replace('"mi-embedded"', '"pair"')
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return ended.stdout


def answer_to(example: str, server: ServerProcess) -> Any:
    return json.loads(output_of(example, server))
