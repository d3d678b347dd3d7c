"""Writes the tables of docs/api.md: `python -m docs.tools.api_reference docs/api.md`.

The page's prose is written by hand. This replaces what is between `<!-- fields of NAME -->` and
`<!-- end -->` by the fields of a model, and what is between `<!-- routes -->` and `<!-- end -->` by
the routes.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from server.wire.openapi import OPERATIONS, document

SECTION: Final = re.compile(r"(<!-- (fields of (\w+)|routes) -->\n).*?(<!-- end -->)", re.DOTALL)
LARGE: Final = 10**6  # bounds above it are written as powers of two


def filled(page: str) -> str:
    """Returns the page with tables from the models."""
    schemas = document("")["components"]["schemas"]

    def section(match: re.Match[str]) -> str:
        name = match[3]
        table = _routes() if name is None else _fields(schemas[name])
        return f"{match[1]}\n{table}\n{match[4]}"

    return SECTION.sub(section, page)


def _routes() -> str:
    lines = ["| route | what it does | status codes |", "|---|---|---|"]
    for one in OPERATIONS:
        statuses = ", ".join(str(status) for status in (200, *sorted(one.refusals)))
        lines.append(f"| `{one.method.upper()} {one.path}` | {one.summary} | {statuses} |")
    return "\n".join(lines) + "\n"


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = "required" if name in required else _default(field.get("default"))
        meaning = " ".join(field.get("description", "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(field)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if value in (None, "", [], {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(schema: Mapping[str, Any]) -> str:
    """Returns a type in words, with its bounds. It leaves out null, which means "not given"."""
    for union in ("anyOf", "oneOf"):
        if union in schema:
            branches = [one for one in schema[union] if one.get("type") != "null"]
            return ", or ".join(_type(one) for one in branches)
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    match schema["type"]:
        case "array":
            return f"list of {_type(schema['items'])}{_length(schema, 'Items', '')}"
        case "object":
            values = schema["additionalProperties"]
            return "object" if values is True else f"object of {_type(values)}"
        case "string":
            return f"string{_length(schema, 'Length', ' characters')}"
    return str(schema["type"]) + _range(schema)


def _length(schema: Mapping[str, Any], of: str, unit: str) -> str:
    least, most = schema.get(f"min{of}"), schema.get(f"max{of}")
    if most is not None:
        return f" ({least or 0} to {_number(most)}{unit})"
    return f" (at least {least}{unit})" if least else ""


def _range(schema: Mapping[str, Any]) -> str:
    bounds = [
        f"{sign} {_number(schema[key])}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    return f" {', '.join(bounds)}" if bounds else ""


def _number(value: float) -> str:
    size = abs(int(value))
    if size > LARGE and size & (size - 1) == 0:
        return f"{'-' if value < 0 else ''}2^{size.bit_length() - 1}"
    return f"{value:g}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
