"""Renders chat templates, in a sandbox, in the jinja dialect that checkpoints are written for.

The dialect is that of `transformers`: trimmed blocks, loop controls, `tojson` without escapes,
`raise_exception`, `strftime_now`, and a `generation` block, which marks text for training and has
no effect here.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.text.checkpoint import CheckpointError, EndpointText
from server.wire.errors import InvalidRequest


class ChatTemplate:
    """One endpoint's template, compiled. Raises `CheckpointError` if it does not parse."""

    def __init__(self, endpoint: EndpointText) -> None:
        try:
            self._template, variables = _compiled(endpoint.chat_template)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{endpoint.directory}: the chat template does not parse: {error}"
            ) from error
        self._special_tokens = endpoint.special_tokens
        self.takes_tools = "tools" in variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns the prompt; with `add_generation_prompt`, up to the assistant's first token.

        Raises `InvalidRequest` if the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error


class _GenerationBlock(Extension):
    """Renders the content of `{% generation %}…{% endgeneration %}`."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compiled(source: str) -> tuple[Template, set[str]]:
    """Returns a compiled template and its variables. Cached: endpoints often share a template."""
    environment = _environment()
    return (
        environment.from_string(source),
        meta.find_undeclared_variables(environment.parse(source)),
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
