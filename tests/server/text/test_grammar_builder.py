"""Response formats and tools become a grammar, which accepts exactly the answers they allow."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from mi_runtime.embedded_pair.tokenizer import TURN_END
from server.text.grammar_builder import LARGEST_SCHEMA, GrammarBuilder
from server.text.tool_parser import ToolCallParser, join_deltas
from server.text.vocabulary import Vocabulary
from server.wire.errors import InvalidRequest
from tests.server.chat_bodies import json_schema, parse, tool
from tests.server.tag_tokens import tokenizer_with_tags

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAGS = ("<tool_call>", "</tool_call>")


Tags = tuple[str, ...]  # that are tokens
SPELLED: Tags = ()


@cache
def tokenizer(tags: Tags) -> Tokenizer:
    return tokenizer_with_tags(*tags)


@pytest.fixture(params=[SPELLED, TAGS, TAGS[:1]], ids=["spelled", "tokens", "mixed"])
def tags(request: pytest.FixtureRequest) -> Tags:
    """Returns the tags of a tool call that are tokens."""
    found: Tags = request.param
    return found


def schema_format(schema: Any, *, strict: bool | None = None) -> dict[str, Any]:
    return json_schema(schema=schema, strict=strict)


def grammar(tags: Tags = SPELLED, **fields: Any) -> str | None:
    """Returns the grammar of a chat request with these fields."""
    return GrammarBuilder(Vocabulary(tokenizer(tags))).grammar(parse(**fields))


def refusal(**fields: Any) -> InvalidRequest:
    """Returns the error that building the grammar of these fields raises."""
    with pytest.raises(InvalidRequest) as caught:
        grammar(**fields)
    assert len(caught.value.message) <= 500
    return caught.value


class AcceptedAnswers:
    """Decides which texts a grammar accepts, token by token."""

    def __init__(self, directory: Path, tags: Tags, **fields: Any) -> None:
        source = grammar(tags, **fields)
        assert source is not None
        path = directory / "tokenizer.json"
        self._tokenizer = tokenizer(tags)
        self._tokenizer.save(str(path))
        eos = self._tokenizer.token_to_id(TURN_END)
        self._matcher = LLMatcher(LLTokenizer(str(path), eos_token=[eos]), source, log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def accept(self, text: str) -> bool:
        """Returns whether the complete text is an answer."""
        matcher = self._matcher.deep_copy()
        ids = self._tokenizer.encode(text).ids
        return matcher.validate_tokens(ids) == len(ids) and (
            all(matcher.consume_token(token_id) for token_id in ids) and matcher.is_accepting()
        )


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


# --- response formats ---


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_plain_text_has_no_grammar(fields: dict[str, Any]) -> None:
    assert grammar(**fields) is None


def test_a_json_object_is_any_object(tmp_path: Path) -> None:
    answers = AcceptedAnswers(tmp_path, SPELLED, response_format={"type": "json_object"})
    assert answers.accept('{"a": [1, {"b": null}]}')
    assert answers.accept("{\n  }")
    assert not answers.accept("[1]")
    assert not answers.accept('{"a": 1} so')


@pytest.mark.parametrize("strict", [None, False, True])
def test_a_schema_constrains_the_answer_whether_it_is_strict_or_not(
    tmp_path: Path, strict: bool | None
) -> None:
    answers = AcceptedAnswers(
        tmp_path, SPELLED, response_format=schema_format(SCHEMA, strict=strict)
    )
    assert answers.accept('{"a": 1}')
    assert not answers.accept('{"a": "1"}')
    assert not answers.accept("{}")


def test_white_space_is_bounded(tmp_path: Path) -> None:
    answers = AcceptedAnswers(tmp_path, SPELLED, response_format=schema_format(SCHEMA))
    assert answers.accept('{\n    "a":   1\n}')
    assert not answers.accept("{" + " " * 21 + '"a": 1}')


def test_a_keyword_that_cannot_be_enforced_is_refused_if_strict_and_else_ignored(
    tmp_path: Path,
) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    error = refusal(response_format=schema_format(schema, strict=True))
    assert error.param == "response_format.json_schema.schema"
    assert "uniqueItems" in error.message
    assert AcceptedAnswers(tmp_path, SPELLED, response_format=schema_format(schema)).accept(
        "[1, 1]"
    )


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
        error = refusal(response_format=schema_format(schema, strict=strict))
        assert error.param == "response_format.json_schema.schema"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


def test_a_schema_nested_too_deep_is_refused() -> None:
    assert grammar(response_format=schema_format(nested(50))) is not None
    error = refusal(response_format=schema_format(nested(70)))
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
def test_a_schema_that_requires_a_special_token_is_refused(schema: dict[str, Any]) -> None:
    """The tokenizer writes it as one special token, which an answer's text cannot contain."""
    error = refusal(response_format=schema_format(schema))
    assert error.param == "response_format.json_schema.schema"
    assert "cannot be generated as text" in error.message


def test_a_special_token_in_a_description_is_accepted() -> None:
    schema = {"properties": {"a": {"description": "no <think>", "const": "<b>"}}}
    assert grammar(response_format=schema_format(schema)) is not None


def test_a_schema_too_large_is_refused() -> None:
    schema = {"enum": ["x" * LARGEST_SCHEMA]}
    assert "larger" in refusal(response_format=schema_format(schema)).message


# --- tools ---


def test_auto_has_a_grammar_only_for_strict_tools_or_without_parallel_calls() -> None:
    tools = [tool("f", parameters=SCHEMA)]
    assert grammar(tools=tools) is None
    assert grammar(tools=tools, tool_choice="none") is None
    assert grammar(tools=[*tools, tool("g", strict=True)]) is not None
    assert grammar(tools=tools, parallel_tool_calls=False) is not None


def test_required_accepts_one_or_more_calls_and_nothing_else(tmp_path: Path, tags: Tags) -> None:
    tools = [tool("f", parameters=SCHEMA), tool("g")]
    answers = AcceptedAnswers(tmp_path, tags, tools=tools, tool_choice="required")
    f, g = call("f", '{"a": 1}'), call("g", "{}")
    assert answers.accept(f)
    assert answers.accept(f"{f}\n{g}")
    assert not answers.accept(f"Well, {f}")
    assert not answers.accept(call("f", '{"a": "x"}'))
    assert not answers.accept(call("g", '{"a": 1}'))
    assert not answers.accept(call("h", "{}"))
    assert not answers.accept('{"a": 1}')


def test_required_without_parallel_calls_accepts_exactly_one_call(
    tmp_path: Path, tags: Tags
) -> None:
    fields: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    answers = AcceptedAnswers(tmp_path, tags, tools=[tool("g")], **fields)
    assert answers.accept(call("g", "{}"))
    assert not answers.accept(call("g", "{}") + "\n" + call("g", "{}"))


def test_a_named_function_must_be_called_once(tmp_path: Path, tags: Tags) -> None:
    tools = [tool("f", parameters=SCHEMA), tool("g")]
    answers = AcceptedAnswers(tmp_path, tags, tools=tools, tool_choice=tool("g"))
    assert answers.accept(call("g", "{}"))
    assert not answers.accept(call("f", '{"a": 1}'))
    assert not answers.accept(call("g", "{}") + "\n" + call("g", "{}"))


def test_auto_constrains_a_strict_function_and_leaves_text_free(tmp_path: Path, tags: Tags) -> None:
    tools = [tool("f", parameters=SCHEMA, strict=True), tool("g")]
    answers = AcceptedAnswers(tmp_path, tags, tools=tools)
    assert answers.accept("No call at all, a < b.\n")
    f, g = call("f", '{"a": 1}'), call("g", '{"any": []}')
    assert answers.accept(f"So: {f}\n{g} done")
    assert not answers.accept(call("f", '{"a": "x"}'))
    assert not answers.accept(call("h", "{}"))


def test_auto_without_parallel_calls_accepts_text_with_at_most_one_call(
    tmp_path: Path, tags: Tags
) -> None:
    answers = AcceptedAnswers(tmp_path, tags, tools=[tool("f")], parallel_tool_calls=False)
    assert answers.accept("No call")
    assert answers.accept("So: " + call("f", "{}"))
    assert not answers.accept(call("f", "{}") + "\n" + call("f", "{}"))


def test_auto_with_a_format_accepts_an_answer_in_it_or_calls(tmp_path: Path, tags: Tags) -> None:
    form = schema_format(SCHEMA)
    answers = AcceptedAnswers(tmp_path, tags, tools=[tool("g")], response_format=form)
    assert answers.accept('{"a": 1}')
    assert answers.accept(call("g", "{}"))
    assert not answers.accept("text")


def test_a_reference_is_resolved_in_its_own_tools_schema(tmp_path: Path) -> None:
    def of(kind: str) -> dict[str, Any]:
        properties = {"x": {"$ref": "#/$defs/x"}}
        return {"properties": properties, "required": ["x"], "$defs": {"x": {"type": kind}}}

    tools = [tool("f", parameters=of("integer")), tool("g", parameters=of("boolean"))]
    answers = AcceptedAnswers(tmp_path, SPELLED, tools=tools, tool_choice="required")
    assert answers.accept(call("f", '{"x": 1}'))
    assert answers.accept(call("g", '{"x": true}'))
    assert not answers.accept(call("g", '{"x": 1}'))


def test_the_tool_parser_reads_what_the_grammar_accepts(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"tools": [tool("f", parameters=SCHEMA)], "tool_choice": "required"}
    text = call("f", '{"a": 1, "b": "</tool_call>"}')
    assert AcceptedAnswers(tmp_path, SPELLED, **fields).accept(text)
    (read,) = join_deltas(ToolCallParser().feed(text).calls)
    assert read["function"] == {"name": "f", "arguments": '{"a": 1, "b": "</tool_call>"}'}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_bad_schema_of_a_tool_is_named(choice: str) -> None:
    tools = [tool("f"), tool("g", parameters={"properties": {"a": {"type": "foo"}}})]
    error = refusal(tools=tools, tool_choice=choice)
    assert error.param == "tools[1].function.parameters"


def test_parameters_that_are_no_object_are_refused() -> None:
    error = refusal(tools=[tool("f", parameters={"type": "string"})])
    assert error.param == "tools[0].function.parameters.type"


def test_a_strict_tool_refuses_what_cannot_be_enforced() -> None:
    schema = {"properties": {"a": {"not": {"type": "string"}}}}
    error = refusal(tools=[tool("f", parameters=schema, strict=True)])
    assert error.param == "tools[0].function.parameters"
    grammar(tools=[tool("f", parameters=schema)])


def test_tools_that_are_too_large_together_are_refused() -> None:
    schema = {"properties": {f"p{n}": {"enum": ["x" * 400]} for n in range(100)}}
    tools = [tool(f"f{n}", parameters=schema) for n in range(20)]
    assert refusal(tools=tools, tool_choice="required").param == "tools"
