"""Prints `docs/configuration.md` from the typed model of settings.

    python -m docs.tools.config_reference > docs/configuration.md

Nothing on that page is written by hand; a test holds the committed page to what this prints.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from server import flags
from server.config import ENVIRONMENT_PREFIX, SECTIONS, Settings

OPENING: Final = f"""\
# Configuration

Printed from the settings themselves by `python -m docs.tools.config_reference`.

Every setting of `mi-server serve` can be given in three ways; the first that names it wins:

1. a flag: `--max-waiting 64`; switches have two forms: `--prefix-caching`, `--no-prefix-caching`
2. the environment: `{ENVIRONMENT_PREFIX}MAX_WAITING=64`
3. a YAML file, named by `--config` or `{ENVIRONMENT_PREFIX}CONFIG`: `max_waiting: 64`

Settings that nobody knows are refused in all three, and so are values that do not fit; the server
then ends with exit code 2 and says which. Nothing changes after the start. Lists are a flag that is
repeated, a variable with commas, or a YAML list.

```yaml
# mi.yaml
instruct: Qwen/Qwen3-4B-Instruct-2507
thinking: Qwen/Qwen3-4B-Thinking-2507
default_lambda: 0.6
api_key_file: /run/secrets/mi-keys
log_format: json
```
"""
WORDS: Final = {int: "whole number", float: "number", bool: "true, false", Path: "path"}
BOUNDS: Final = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([OPENING, *_tables()])


def _tables() -> Iterator[str]:
    for title, settings in flags.sections(Settings, SECTIONS):
        yield f"## {title}\n"
        yield "| flag | variable | takes | default | |"
        yield "|---|---|---|---|---|"
        yield from (_row(name, field) for name, field in settings.items())
        yield ""


def _row(name: str, field: FieldInfo) -> str:
    default = flags.default(field)
    cells = [
        f"`{flags.flag(name)}`",
        f"`{ENVIRONMENT_PREFIX}{name.upper()}`",
        _takes(field),
        f"`{default}`" if default else "",
        flags.described(field),
    ]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _takes(field: FieldInfo) -> str:
    if flags.choices(field):
        return ", ".join(f"`{choice}`" for choice in flags.choices(field))
    if flags.is_list(field):
        return "list"
    kind = flags.plain_type(field)
    if kind is SecretStr:
        return "secret"
    return " ".join([WORDS.get(kind, "text"), *_bounds(field)])


def _bounds(field: FieldInfo) -> Iterator[str]:
    for rule in _rules(field):
        for kind, (attribute, sign) in BOUNDS.items():
            if isinstance(rule, kind):
                yield f"{sign} {getattr(rule, attribute)}"


def _rules(field: FieldInfo) -> list[Any]:
    """Of the value; those of an optional one stand inside its union."""
    rules = list(field.metadata)
    for member in getattr(field.annotation, "__args__", ()):
        for rule in getattr(member, "__metadata__", ()):
            rules += rule.metadata if isinstance(rule, FieldInfo) else [rule]
    return rules


if __name__ == "__main__":
    print(page(), end="")
