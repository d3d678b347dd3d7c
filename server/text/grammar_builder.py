"""Builds the grammar that an answer must follow, from the response format and the tools.

Each schema is checked by itself, so that an error names the one at fault. This module knows the
format of tool calls and `llguidance`'s Lark dialect, but no token ids: a grammar names a token by
its text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

import llguidance  # noqa: F401 - here, so that the first request with a schema need not wait

from mi_runtime.scheduling.grammar import fault_of
from server.text.reasoning_parser import TOOL_CALL, TOOL_CALL_END
from server.text.vocabulary import Vocabulary
from server.wire.chat_request import ChatRequest
from server.wire.errors import InvalidRequest, bounded
from server.wire.tools import FunctionTool, NamedTool

LARGEST_SCHEMA: Final = 64 * 1024  # bytes of JSON, without white space
LARGEST_GRAMMAR: Final = 512 * 1024  # characters, for all tools of a request
CHECKED: Final = 256  # results of checks that are cached
WHITE_SPACE: Final = r"[ \n\t]{0,20}"
"""White space between the parts of JSON. Bounded, because a model may write it without end."""

_ANNOTATIONS: Final = frozenset({"title", "description", "$comment", "default", "examples"})
"""Keywords whose values do not constrain an answer."""
_ANY_OBJECT: Final[dict[str, Any]] = {"type": "object"}
_NO_ARGUMENTS: Final = _ANY_OBJECT | {"properties": {}, "additionalProperties": False}


class GrammarBuilder:
    """Builds grammars for one vocabulary. Safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._opening = _tag(TOOL_CALL, vocabulary)
        self._closing = _tag(TOOL_CALL_END, vocabulary)
        self._token_names = _token_names(vocabulary)
        self._fault_of = lru_cache(CHECKED)(fault_of)

    def grammar(self, request: ChatRequest) -> str | None:
        """Returns the grammar of the answer, or None if it is free. It can take about 100 ms.

        Raises `InvalidRequest` for a schema that is wrong, too large, or cannot be enforced.
        """
        answer = self._answer_schema(request)
        tools = self._arguments(request)
        if not tools:
            return None if answer is None else _lark(f"start: {_json(answer)}")
        source = self._with_tools(request, tools, answer)
        if source is not None and (len(source) > LARGEST_GRAMMAR or self._fault_of(source)):
            raise InvalidRequest(
                f"The schemas of `tools` exceed {LARGEST_GRAMMAR // 1024} KiB in total",
                param="tools",
            )
        return source

    def _answer_schema(self, request: ChatRequest) -> dict[str, Any] | None:
        form = request.response_format
        if form is None or form.type == "text":
            return None
        if form.json_schema is None:
            return _guided(_ANY_OBJECT, strict=True)
        return self._checked(
            form.json_schema.schema_, form.json_schema.strict, "response_format.json_schema.schema"
        )

    def _arguments(self, request: ChatRequest) -> dict[str, dict[str, Any]]:
        """Returns the checked schema of each offered function's arguments, by name."""
        checked = {}
        for index, tool in enumerate(request.offered_tools):
            param = f"tools[{index}].function.parameters"
            schema = _NO_ARGUMENTS if tool.parameters is None else tool.parameters
            if schema.get("type", "object") != "object":
                raise InvalidRequest(f"`{param}.type` must be 'object'", param=f"{param}.type")
            checked[tool.name] = self._checked({"type": "object"} | schema, tool.strict, param)
        return checked

    def _checked(self, schema: dict[str, Any], strict: bool, param: str) -> dict[str, Any]:
        guided = _guided(schema, strict=strict)
        alone = _compact({"grammars": [{"json_schema": guided}]})
        if len(alone) > LARGEST_SCHEMA:
            raise InvalidRequest(
                f"`{param}` is larger than {LARGEST_SCHEMA} bytes of JSON", param=param
            )
        token = next(filter(None, map(self._token_names.search, _strings(schema))), None)
        if token is not None:
            raise InvalidRequest(
                f"`{param}` contains {token[0]!r}, a special token, which cannot be generated as text",
                param=param,
            )
        fault = self._fault_of(alone)
        if fault is not None:
            raise InvalidRequest(
                f"`{param}` is not a schema that can be enforced: {bounded(fault, 300)}",
                param=param,
            )
        return guided

    def _with_tools(
        self, request: ChatRequest, tools: dict[str, dict[str, Any]], answer: dict[str, Any] | None
    ) -> str | None:
        choice, several = request.tool_choice, request.parallel_tool_calls
        if isinstance(choice, NamedTool):
            only = {choice.function.name: tools[choice.function.name]}
            return _lark("start: call", *self._calls(only))
        calls = "start: call (BREAK call)*" if several else "start: call"
        if choice == "required":
            return _lark(calls, *self._calls(tools))
        if answer is not None:
            return _lark(f"{calls} | answer", f"answer: {_json(answer)}", *self._calls(tools))
        strict = any(tool.strict for tool in request.offered_tools)
        if not strict and several:
            return None  # the tool parser reads any calls
        return self._free_text(_strict_schemas(request.offered_tools, tools), several=several)

    def _calls(self, tools: dict[str, dict[str, Any]]) -> Sequence[str]:
        return [f"call: {self._opening} body", 'BREAK: "\\n"', *self._bodies(tools)]

    def _free_text(self, tools: dict[str, dict[str, Any]], *, several: bool) -> str:
        """Returns the grammar of any text in which an opening tag begins a call."""
        # A tag that is not a token is lazy, so that it ends the text before it.
        lazy = "" if self._opening == TOOL_CALL else "[lazy]"
        opening = f"opening{lazy}: TEXT {self._opening}"
        start = "start: (opening body)* TEXT" if several else "start: TEXT | opening body"
        return _lark(start, opening, r"TEXT: /(.|\n)*/", *self._bodies(tools))

    def _bodies(self, tools: dict[str, dict[str, Any]]) -> Sequence[str]:
        """Returns the rules of what follows the opening tag, up to the closing one."""
        rules = ["body: " + " | ".join(f"body_{index}" for index in range(len(tools)))]
        for index, (name, schema) in enumerate(tools.items()):
            head = json.dumps(f'\n{{"name": {json.dumps(name)}, "arguments": ')
            tail = json.dumps("}\n")
            rules.append(f"body_{index}: {head} arguments_{index} {tail} {self._closing}")
            rules.append(f"arguments_{index}: {_json(schema)}")
        return rules


def _tag(tag: str, vocabulary: Vocabulary) -> str:
    """Returns how a grammar names a tag: as a token if it is one, or else as text."""
    is_token = vocabulary.tokenizer.token_to_id(tag) is not None
    return tag if is_token else json.dumps(tag)


def _token_names(vocabulary: Vocabulary) -> re.Pattern[str]:
    """Returns a pattern of tokens that are never text in a grammar: `<|im_end|>`, `<think>`, …"""
    added = vocabulary.tokenizer.get_added_tokens_decoder().values()
    names = [re.escape(it.content) for it in added if it.special or it.content.startswith("<")]
    return re.compile("|".join(names) or r"(?!)")


def _strings(schema: Any) -> Iterator[str]:
    """Yields the strings that the schema may require in an answer."""
    if isinstance(schema, str):
        yield schema
    elif isinstance(schema, list):
        for item in schema:
            yield from _strings(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            yield key
            if key not in _ANNOTATIONS or isinstance(value, dict):
                yield from _strings(value)


def _strict_schemas(
    offered: Sequence[FunctionTool], tools: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns the schemas if the model may choose to call: without `strict`, any object fits."""
    return {
        tool.name: tools[tool.name] if tool.strict else _guided(_ANY_OBJECT, strict=True)
        for tool in offered
    }


def _guided(schema: dict[str, Any], *, strict: bool) -> dict[str, Any]:
    """Returns the schema with `llguidance`'s settings in it."""
    return schema | {"x-guidance": {"whitespace_pattern": WHITE_SPACE, "lenient": not strict}}


def _json(schema: dict[str, Any]) -> str:
    return f"%json {_compact(schema)}"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _lark(*rules: str) -> str:
    return "\n".join(["%llguidance {}", *rules]) + "\n"
