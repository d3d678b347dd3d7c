"""Messages become token ids by the template of their λ, and a final message can be continued."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mi_runtime.request import Dial
from server.text.checkpoint import EndpointText
from server.text.prompt import MARK, Ending, PromptBuilder
from server.wire.errors import InvalidRequest
from server.wire.messages import Message
from server.wire.tools import CalledFunction, FunctionTool, ToolCall


@pytest.fixture(scope="module")
def endpoints(
    instruct_directory: Path, opening_directory: Path
) -> tuple[EndpointText, EndpointText]:
    return EndpointText.read(instruct_directory), EndpointText.read(opening_directory)


# --- the choice of a template, and its think block ---


@pytest.mark.parametrize(
    ("value", "threshold", "opens"),
    [(0.0, 0.0, False), (0.01, 0.0, True), (1.0, 0.0, True), (0.4, 0.4, False), (0.41, 0.4, True)],
)
def test_above_the_threshold_the_thinking_template_is_used(
    endpoints: tuple[EndpointText, EndpointText], value: float, threshold: float, opens: bool
) -> None:
    prompts = PromptBuilder(*endpoints, think_threshold=lambda: threshold)
    assert prompts.build([Message(role="user", content="x")], Dial(value)).opens_block is opens


def test_a_template_can_be_pinned(endpoints: tuple[EndpointText, EndpointText]) -> None:
    prompts = PromptBuilder(*endpoints, template="instruct")
    assert not prompts.build([Message(role="user", content="x")], Dial(1.0)).opens_block


def test_a_think_tag_in_a_message_opens_no_block(
    endpoints: tuple[EndpointText, EndpointText],
) -> None:
    prompts = PromptBuilder(*endpoints)
    prompt = prompts.build([Message(role="user", content="what is <think>")], Dial(0.0))
    assert not prompt.opens_block


def test_each_dial_gets_the_prompt_of_its_own_template(
    endpoints: tuple[EndpointText, EndpointText],
) -> None:
    prompts = PromptBuilder(*endpoints)
    messages = [Message(role="user", content="x")]
    dials = [Dial(1.0), Dial(0.0), Dial(0.4)]
    built = prompts.build_each(messages, dials)
    assert built == [prompts.build(messages, dial) for dial in dials]
    assert [prompt.opens_block for prompt in built] == [True, False, True]
    assert built[0] is built[2]


def test_a_developer_message_is_rendered_as_a_system_message(
    endpoints: tuple[EndpointText, EndpointText],
) -> None:
    prompts = PromptBuilder(*endpoints)
    built = {
        prompts.build([Message(role=role, content="x")], Dial(0.0))
        for role in ("system", "developer")
    }
    assert len(built) == 1


# --- continuing the final message ---

THINKING_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role == 'user' -%}U:{{ message.content }};
    {%- else -%}A:<think>
{{ (message.reasoning_content or '').strip('\\n') }}
</think>

{{ message.content.lstrip('\\n') }};
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}A:<think>{%- endif -%}"""
PLAIN_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content.strip() }};{% endfor %}"


@pytest.fixture
def continued(endpoints: tuple[EndpointText, EndpointText]) -> Callable[..., tuple[str, bool]]:
    """Returns a function of a template and a final message that the prompt continues.

    It gives the prompt's text, and whether it ends inside a think block.
    """

    def prompt(template: str, content: str = "", reasoning: str | None = None) -> tuple[str, bool]:
        endpoint = replace(endpoints[0], chat_template=template)
        prompts = PromptBuilder(endpoint, endpoint)
        last = Message(role="assistant", content=content, reasoning_content=reasoning)
        user = Message(role="user", content="hi")
        built = prompts.build([user, last], Dial(1.0), Ending.IN_LAST_MESSAGE)
        return prompts.vocabulary.decode(built.token_ids), built.opens_block

    return prompt


@pytest.mark.parametrize(
    ("template", "message", "text", "inside"),
    [
        (PLAIN_TEMPLATE, ("so ",), "[assistant]so ", False),
        (PLAIN_TEMPLATE, ("",), "[assistant]", False),
        (PLAIN_TEMPLATE, ("hi;",), "[assistant]hi;", False),  # the user wrote the same text
        (PLAIN_TEMPLATE, ("", "so\n"), "[assistant]<think>\nso\n", True),
        (PLAIN_TEMPLATE, ("<think>\nso",), "[assistant]<think>\nso", True),
        (PLAIN_TEMPLATE, ("<think>",), "[assistant]<think>\n", True),
        (PLAIN_TEMPLATE, ("<think>a</think>b",), "[assistant]<think>a</think>b", False),
        (PLAIN_TEMPLATE, ("a <think> b",), "[assistant]a <think> b", False),
        (THINKING_TEMPLATE, ("so ", "r"), "A:<think>\nr\n</think>\n\nso ", False),
        (THINKING_TEMPLATE, ("", "r \n"), "A:<think>\nr \n", True),
        (THINKING_TEMPLATE, ("<think>\nr",), "A:<think>\nr", True),
    ],
)
def test_a_continued_message_ends_where_its_text_ends(
    continued: Callable[..., tuple[str, bool]],
    template: str,
    message: tuple[str, ...],
    text: str,
    inside: bool,
) -> None:
    prompt, opens_block = continued(template, *message)
    assert prompt.endswith(text)
    assert MARK not in prompt
    assert opens_block is inside


def test_a_template_that_drops_the_final_message_cannot_continue_it(
    continued: Callable[..., tuple[str, bool]],
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        continued("{{ messages[0].content }}", "so")
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("ending", "end"),
    [(Ending.NEW_TURN, "A:<think>"), (Ending.LAST_TURN, "U:hi;")],
)
def test_a_prompt_ends_with_a_new_turn_or_with_the_last_one(
    endpoints: tuple[EndpointText, EndpointText], ending: Ending, end: str
) -> None:
    endpoint = replace(endpoints[0], chat_template=THINKING_TEMPLATE)
    prompts = PromptBuilder(endpoint, endpoint)
    built = prompts.build([Message(role="user", content="hi")], Dial(1.0), ending)
    assert prompts.vocabulary.decode(built.token_ids).endswith(end)
    assert built.opens_block == end.endswith("<think>")


# --- tools ---

ADD = FunctionTool(name="add", description="Adds.", parameters={"type": "object"}, strict=True)


def calling(arguments: str) -> Message:
    call = ToolCall(id="c", function=CalledFunction(name="add", arguments=arguments))
    return Message(role="assistant", tool_calls=[call])


def test_tools_are_shown_as_the_client_described_them(
    endpoints: tuple[EndpointText, EndpointText],
) -> None:
    prompts = PromptBuilder(*endpoints)
    prompt = prompts.build([Message(role="user", content="hi")], Dial(0.0), tools=[ADD])
    text = prompts.vocabulary.tokenizer.decode(list(prompt.token_ids))
    shown = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    assert json.dumps({"type": "function", "function": shown}) in text


def test_a_pair_whose_template_has_no_place_for_tools_refuses_them(
    endpoints: tuple[EndpointText, EndpointText],
) -> None:
    without_tools = replace(endpoints[0], chat_template="{{ messages[0].content }}")
    prompts = PromptBuilder(without_tools, without_tools)
    with pytest.raises(InvalidRequest) as caught:
        prompts.build([Message(role="user", content="hi")], Dial(0.0), tools=[ADD])
    assert caught.value.param == "tools"
    prompts.build([Message(role="user", content="hi")], Dial(0.0))


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [('{"a": "é"}', '{"a":"é"}'), ("[1]", '"[1]"'), ("{nonsense", '"{nonsense"')],
)
def test_arguments_that_are_an_object_reach_the_template_as_one(
    endpoints: tuple[EndpointText, EndpointText], arguments: str, seen: str
) -> None:
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson | replace(': ', ':') }}"
    prompts = PromptBuilder(*[replace(endpoints[0], chat_template=template)] * 2)
    prompt = prompts.build([calling(arguments)], Dial(0.0))
    assert prompts.vocabulary.tokenizer.decode(list(prompt.token_ids)) == seen


def test_a_call_and_its_result_are_rendered(endpoints: tuple[EndpointText, EndpointText]) -> None:
    prompts = PromptBuilder(*endpoints)
    answer = Message(role="tool", tool_call_id="c", content="6")
    messages = [Message(role="user", content="hi"), calling('{"a":1}'), answer]
    text = prompts.vocabulary.tokenizer.decode(list(prompts.build(messages, Dial(0.0)).token_ids))
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\n6\n</tool_response>" in text
