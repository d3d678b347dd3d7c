"""From response format and tools to a grammar: what it accepts is asked of a matcher."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from mi_runtime.embedded_pair.tokenizer import TURN_END, build_tokenizer
from server.text.grammar_builder import LARGEST_SCHEMA, GrammarBuilder
from server.text.tool_parser import ToolCallParser, join_deltas
from server.text.vocabulary import Vocabulary
from server.wire.chat_request import parse_chat_request
from server.wire.errors import InvalidRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAGS = ("<tool_call>", "</tool_call>")


Tags = tuple[str, ...]  # that are tokens
SPELLED: Tags = ()


@cache
def tokenizer(tags: Tags) -> Tokenizer:
    made = build_tokenizer()
    made.add_tokens(list(tags))
    return made


@pytest.fixture(params=[SPELLED, TAGS, TAGS[:1]], ids=["spelled", "tokens", "mixed"])
def tags(request: pytest.FixtureRequest) -> Tags:
    found: Tags = request.param
    return found


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def json_schema(schema: Any, *, strict: bool | None = None) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": schema, "strict": strict},
    }


def grammar(tags: Tags = SPELLED, **fields: Any) -> str | None:
    base = {"model": "pair", "messages": [{"role": "user", "content": "hi"}]}
    request = parse_chat_request(json.dumps(base | fields).encode())
    return GrammarBuilder(Vocabulary(tokenizer(tags))).grammar(request)


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        grammar(**fields)
    assert len(caught.value.message) <= 500
    return caught.value


class Answers:
    """What a grammar accepts, token by token."""

    def __init__(self, directory: Path, tags: Tags, **fields: Any) -> None:
        source = grammar(tags, **fields)
        assert source is not None
        path = directory / "tokenizer.json"
        self._tokenizer = tokenizer(tags)
        self._tokenizer.save(str(path))
        eos = self._tokenizer.token_to_id(TURN_END)
        self._matcher = LLMatcher(LLTokenizer(str(path), eos_token=[eos]), source, log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def take(self, text: str) -> bool:
        """Whether the whole text is an answer."""
        matcher = self._matcher.deep_copy()
        ids = self._tokenizer.encode(text).ids
        return matcher.validate_tokens(ids) == len(ids) and (
            all(matcher.consume_token(token_id) for token_id in ids) and matcher.is_accepting()
        )


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


# --- response formats ---


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_text_is_held_to_nothing(fields: dict[str, Any]) -> None:
    assert grammar(**fields) is None


def test_a_json_object_is_any_object(tmp_path: Path) -> None:
    answers = Answers(tmp_path, SPELLED, response_format={"type": "json_object"})
    assert answers.take('{"a": [1, {"b": null}]}')
    assert answers.take("{\n  }")
    assert not answers.take("[1]")
    assert not answers.take('{"a": 1} so')


@pytest.mark.parametrize("strict", [None, False, True])
def test_a_schema_holds_whether_it_is_strict_or_not(tmp_path: Path, strict: bool | None) -> None:
    answers = Answers(tmp_path, SPELLED, response_format=json_schema(SCHEMA, strict=strict))
    assert answers.take('{"a": 1}')
    assert not answers.take('{"a": "1"}')
    assert not answers.take("{}")


def test_white_space_is_bounded(tmp_path: Path) -> None:
    answers = Answers(tmp_path, SPELLED, response_format=json_schema(SCHEMA))
    assert answers.take('{\n    "a":   1\n}')
    assert not answers.take("{" + " " * 21 + '"a": 1}')


def test_strict_refuses_what_cannot_be_enforced_and_else_it_is_left_out(tmp_path: Path) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    error = refusal(response_format=json_schema(schema, strict=True))
    assert error.param == "response_format.json_schema.schema"
    assert "uniqueItems" in error.message
    assert Answers(tmp_path, SPELLED, response_format=json_schema(schema)).take("[1, 1]")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "foo"},
        {"type": "object", "required": 5},
        {"type": "string", "pattern": "("},
        {"$ref": "http://example.com/schema"},
        {"type": "string", "minLength": 5, "maxLength": 2},
        {"properties": {f"p{n}": {"enum": ["x" * 50]} for n in range(1000)}},
    ],
)
def test_a_bad_schema_is_refused_strict_or_not(schema: dict[str, Any]) -> None:
    for strict in (False, True):
        error = refusal(response_format=json_schema(schema, strict=strict))
        assert error.param == "response_format.json_schema.schema"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def test_a_schema_nested_too_deep_is_refused() -> None:
    assert grammar(response_format=json_schema(nested(50))) is not None
    error = refusal(response_format=json_schema(nested(70)))
    assert error.param == "response_format.json_schema.schema"
    assert "recursion limit" in error.message


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "a<think>"},
        {"enum": [1, ["<|im_end|>"]]},
        {"properties": {"<think>": {}}},
        {"properties": {"description": {"const": "</think>"}}},
    ],
)
def test_a_schema_that_wants_a_special_token_said_is_refused(schema: dict[str, Any]) -> None:
    """Its text is one token, and that token is no text: the answer would have failed."""
    error = refusal(response_format=json_schema(schema))
    assert error.param == "response_format.json_schema.schema"
    assert "is a token of this model" in error.message


def test_a_special_token_in_what_is_for_people_is_no_matter() -> None:
    schema = {"properties": {"a": {"description": "no <think>", "const": "<b>"}}}
    assert grammar(response_format=json_schema(schema)) is not None


def test_a_schema_too_large_is_refused() -> None:
    schema = {"enum": ["x" * LARGEST_SCHEMA]}
    assert "larger" in refusal(response_format=json_schema(schema)).message


# --- tools ---


def test_in_auto_calls_are_free_unless_one_is_strict_or_only_one_may_be() -> None:
    tools = [tool("f", parameters=SCHEMA)]
    assert grammar(tools=tools) is None
    assert grammar(tools=tools, tool_choice="none") is None
    assert grammar(tools=[*tools, tool("g", strict=True)]) is not None
    assert grammar(tools=tools, parallel_tool_calls=False) is not None


def test_required_is_one_call_or_more_and_nothing_else(tmp_path: Path, tags: Tags) -> None:
    tools = [tool("f", parameters=SCHEMA), tool("g")]
    answers = Answers(tmp_path, tags, tools=tools, tool_choice="required")
    f, g = call("f", '{"a": 1}'), call("g", "{}")
    assert answers.take(f)
    assert answers.take(f"{f}\n{g}")
    assert not answers.take(f"Well, {f}")
    assert not answers.take(call("f", '{"a": "x"}'))
    assert not answers.take(call("g", '{"a": 1}'))
    assert not answers.take(call("h", "{}"))
    assert not answers.take('{"a": 1}')


def test_without_parallel_calls_required_is_one(tmp_path: Path, tags: Tags) -> None:
    fields: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    answers = Answers(tmp_path, tags, tools=[tool("g")], **fields)
    assert answers.take(call("g", "{}"))
    assert not answers.take(call("g", "{}") + "\n" + call("g", "{}"))


def test_a_named_function_is_called_once(tmp_path: Path, tags: Tags) -> None:
    tools = [tool("f", parameters=SCHEMA), tool("g")]
    answers = Answers(tmp_path, tags, tools=tools, tool_choice=tool("g"))
    assert answers.take(call("g", "{}"))
    assert not answers.take(call("f", '{"a": 1}'))
    assert not answers.take(call("g", "{}") + "\n" + call("g", "{}"))


def test_a_strict_function_is_held_in_auto_and_text_is_free(tmp_path: Path, tags: Tags) -> None:
    tools = [tool("f", parameters=SCHEMA, strict=True), tool("g")]
    answers = Answers(tmp_path, tags, tools=tools)
    assert answers.take("No call at all, a < b.\n")
    f, g = call("f", '{"a": 1}'), call("g", '{"any": []}')
    assert answers.take(f"So: {f}\n{g} done")
    assert not answers.take(call("f", '{"a": "x"}'))
    assert not answers.take(call("h", "{}"))


def test_without_parallel_calls_auto_is_text_or_one_call(tmp_path: Path, tags: Tags) -> None:
    answers = Answers(tmp_path, tags, tools=[tool("f")], parallel_tool_calls=False)
    assert answers.take("No call")
    assert answers.take("So: " + call("f", "{}"))
    assert not answers.take(call("f", "{}") + "\n" + call("f", "{}"))


def test_with_a_format_auto_is_an_answer_in_it_or_calls(tmp_path: Path, tags: Tags) -> None:
    form = json_schema(SCHEMA)
    answers = Answers(tmp_path, tags, tools=[tool("g")], response_format=form)
    assert answers.take('{"a": 1}')
    assert answers.take(call("g", "{}"))
    assert not answers.take("text")


def test_a_reference_is_to_its_own_schema(tmp_path: Path) -> None:
    def of(kind: str) -> dict[str, Any]:
        properties = {"x": {"$ref": "#/$defs/x"}}
        return {"properties": properties, "required": ["x"], "$defs": {"x": {"type": kind}}}

    tools = [tool("f", parameters=of("integer")), tool("g", parameters=of("boolean"))]
    answers = Answers(tmp_path, SPELLED, tools=tools, tool_choice="required")
    assert answers.take(call("f", '{"x": 1}'))
    assert answers.take(call("g", '{"x": true}'))
    assert not answers.take(call("g", '{"x": 1}'))


def test_what_the_grammar_writes_the_parser_reads(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"tools": [tool("f", parameters=SCHEMA)], "tool_choice": "required"}
    text = call("f", '{"a": 1, "b": "</tool_call>"}')
    assert Answers(tmp_path, SPELLED, **fields).take(text)
    (read,) = join_deltas(ToolCallParser().feed(text).calls)
    assert read["function"] == {"name": "f", "arguments": '{"a": 1, "b": "</tool_call>"}'}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_bad_schema_of_a_tool_is_named(choice: str) -> None:
    tools = [tool("f"), tool("g", parameters={"properties": {"a": {"type": "foo"}}})]
    error = refusal(tools=tools, tool_choice=choice)
    assert error.param == "tools[1].function.parameters"


def test_arguments_are_an_object() -> None:
    error = refusal(tools=[tool("f", parameters={"type": "string"})])
    assert error.param == "tools[0].function.parameters.type"


def test_a_strict_tool_refuses_what_cannot_be_enforced() -> None:
    schema = {"properties": {"a": {"not": {"type": "string"}}}}
    error = refusal(tools=[tool("f", parameters=schema, strict=True)])
    assert error.param == "tools[0].function.parameters"
    grammar(tools=[tool("f", parameters=schema)])


def test_tools_that_are_too_much_together_are_refused() -> None:
    schema = {"properties": {f"p{n}": {"enum": ["x" * 400]} for n in range(100)}}
    tools = [tool(f"f{n}", parameters=schema) for n in range(20)]
    assert refusal(tools=tools, tool_choice="required").param == "tools"
