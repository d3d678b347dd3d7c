"""Prints `docs/configuration.md` from the typed model of settings.

    python -m docs.tools.config_reference > docs/configuration.md

Nothing on that page is written by hand; a test compares the committed page with the output.
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

All settings of `mi-server serve`. `python -m docs.tools.config_reference` writes this page.

A setting can be given in three ways. The first one in this list wins:

1. a flag: `--max-waiting 64`; a switch has two: `--prefix-caching` and `--no-prefix-caching`
2. an environment variable: `{ENVIRONMENT_PREFIX}MAX_WAITING=64`
3. a YAML file, named by `--config` or `{ENVIRONMENT_PREFIX}CONFIG`: `max_waiting: 64`

The server refuses unknown settings and invalid values in all three: it names them and exits with
code 2. Settings cannot be changed while it runs. A list is a repeated flag, a variable with commas,
or a YAML list.

```yaml
# mi.yaml
instruct: Qwen/Qwen3-4B-Instruct-2507
thinking: Qwen/Qwen3-4B-Thinking-2507
default_lambda: 0.6
api_key_file: /run/secrets/mi-keys
log_format: json
```
"""
WORDS: Final = {int: "integer", float: "number", bool: "true, false", Path: "path"}
BOUNDS: Final = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def page() -> str:
    """Returns the page, in Markdown."""
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
        flags.description(field),
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
    bounds = ", ".join(_bounds(field))
    return f"{WORDS.get(kind, 'text')} {bounds}".rstrip()


def _bounds(field: FieldInfo) -> Iterator[str]:
    for rule in _rules(field):
        for kind, (attribute, sign) in BOUNDS.items():
            if isinstance(rule, kind):
                yield f"{sign} {getattr(rule, attribute)}"


def _rules(field: FieldInfo) -> list[Any]:
    """The rules of the value; those of an optional value are inside its union."""
    rules = list(field.metadata)
    for member in getattr(field.annotation, "__args__", ()):
        for rule in getattr(member, "__metadata__", ()):
            rules += rule.metadata if isinstance(rule, FieldInfo) else [rule]
    return rules


if __name__ == "__main__":
    print(page(), end="")
