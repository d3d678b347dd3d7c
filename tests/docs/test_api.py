"""The tables of `docs/api.md` describe every model of a request, as the models do."""

import json
import re
from pathlib import Path

from docs.tools.api_reference import filled
from server.wire.openapi import OPERATIONS, document

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_page_is_the_output_of_its_tool() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "run: python -m docs.tools.api_reference docs/api.md"


def test_the_reference_has_every_model_that_a_request_can_hold() -> None:
    documented = set(re.findall(r"<!-- fields of (\w+) -->", PAGE.read_text(encoding="utf-8")))
    schemas = document("1")["components"]["schemas"]
    found = {one.body.__name__ for one in OPERATIONS if one.body is not None}
    pending = list(found)
    while pending:
        schema = json.dumps(schemas[pending.pop()])
        new = set(re.findall(r"#/components/schemas/(\w+)", schema)) - found
        found |= new
        pending += new
    assert documented == found
