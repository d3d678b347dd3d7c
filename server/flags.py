"""Makes the flags of a command from a typed model of settings, in groups with readable help.

It knows names, defaults and descriptions. The model checks the values, so that flags, environment
and file follow the same rules.
"""

import argparse
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

HELP_COLUMN: Final = 32
WIDTH: Final = 100


def sections(
    model: type[BaseModel], titles: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """Yields each title with its settings; `titles` gives the first setting of each title."""
    names = list(model.model_fields)
    starts = [names.index(first) for first in titles.values()]
    for title, start, end in zip(titles, starts, [*starts[1:], len(names)], strict=True):
        yield title, {name: model.model_fields[name] for name in names[start:end]}


def parse(
    model: type[BaseModel], titles: Mapping[str, str], arguments: Sequence[str]
) -> dict[str, Any]:
    """Returns the settings that the flags give, unchecked.

    Exits for `--help` and for an unknown flag.
    """
    return vars(_parser(model, titles).parse_args(arguments))


def flag(name: str) -> str:
    """Returns the flag of a setting."""
    return "--" + name.replace("_", "-")


def description(field: FieldInfo) -> str:
    """Returns what a setting does, in one line."""
    return " ".join((field.description or "").split())


def default(field: FieldInfo) -> str:
    """Returns the default as a user would write it, or nothing if the description names it."""
    value = field.default
    if value is None or value == [] or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)


def plain_type(field: FieldInfo) -> Any:
    """Returns the type of a setting without `Annotated` and `None`."""
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(it for it in typing.get_args(annotation) if it is not types.NoneType)
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def is_list(field: FieldInfo) -> bool:
    return typing.get_origin(plain_type(field)) is list


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Returns the words that a setting may have; empty if it is not limited to some."""
    kind = plain_type(field)
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_COLUMN, width=WIDTH)


def _parser(model: type[BaseModel], titles: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mi-server serve",
        usage="mi-server serve [flags]",
        description=f"{model.__doc__}\n\nFlags override the environment (MI_PORT=8000), which "
        "overrides a YAML file (port: 8000).",
        epilog="All settings: docs/configuration.md",
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, settings in sections(model, titles):
        group = parser.add_argument_group(title)
        for name, field in settings.items():
            _add(group, name, field)
    return parser


def _add(group: "argparse._ArgumentGroup", name: str, field: FieldInfo) -> None:
    shown = default(field)
    text = description(field) + (f" [{shown}]" if shown else "")
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if plain_type(field) is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = _placeholder(name, field)
        options["action"] = "append" if is_list(field) else "store"
    group.add_argument(flag(name), **options)


def _placeholder(name: str, field: FieldInfo) -> str:
    """Returns the placeholder of the value in the help."""
    if choices(field):
        return "{" + ",".join(choices(field)) + "}"
    if plain_type(field) in (int, float):
        return "N" if plain_type(field) is int else "X"
    return name.rsplit("_", maxsplit=1)[-1].upper()
