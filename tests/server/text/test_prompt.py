import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mi_runtime.request import Dial
from server.text.chat_template import ChatTemplate
from server.text.checkpoint import CheckpointError, EndpointText, local_directory
from server.text.prompt import MARK, Ending, PromptBuilder
from server.wire.errors import InvalidRequest
from server.wire.messages import Message
from server.wire.tools import CalledFunction, FunctionTool, ToolCall


@pytest.fixture(scope="module")
def endpoints(
    instruct_directory: Path, opening_directory: Path
) -> tuple[EndpointText, EndpointText]:
    return EndpointText.read(instruct_directory), EndpointText.read(opening_directory)


def endpoint(template: str) -> EndpointText:
    return EndpointText(Path("nowhere"), template, {"eos_token": "<eos>"}, frozenset())


def render(template: str, text: str = "hi") -> str:
    return ChatTemplate(endpoint(template)).render([{"role": "user", "content": text}])


# --- the dialect ---


def test_a_template_sees_messages_and_special_tokens() -> None:
    assert render("{{ messages[0].content }}{{ eos_token }}{{ add_generation_prompt }}") == (
        "hi<eos>True"
    )


def test_blocks_are_trimmed_as_transformers_does() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_loop_controls_work() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")


def test_tojson_keeps_letters_and_does_not_escape_html() -> None:
    assert render("{{ messages[0] | tojson }}", "é<&>") == '{"role": "user", "content": "é<&>"}'


def test_a_generation_block_renders_what_is_between() -> None:
    assert render("a{% generation %}b{% endgeneration %}c") == "abc"


def test_a_template_may_ask_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}").startswith("20")


def test_a_refusal_of_the_template_is_about_the_messages() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


def test_a_template_reaches_nothing_outside_its_sandbox() -> None:
    with pytest.raises(InvalidRequest):
        render("{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_a_template_that_does_not_parse_is_the_operators_problem() -> None:
    with pytest.raises(CheckpointError, match="does not parse"):
        render("{% if %}")


# --- which template, and what it opens ---


@pytest.mark.parametrize(
    ("value", "threshold", "opens"),
    [(0.0, 0.0, False), (0.01, 0.0, True), (1.0, 0.0, True), (0.4, 0.4, False), (0.41, 0.4, True)],
)
def test_above_the_threshold_the_thinking_template_is_taken(
    endpoints: tuple[EndpointText, EndpointText], value: float, threshold: float, opens: bool
) -> None:
    prompts = PromptBuilder(*endpoints, think_threshold=lambda: threshold)
    assert prompts.build([Message(role="user", content="x")], Dial(value)).opens_block is opens


def test_a_template_can_be_pinned(endpoints: tuple[EndpointText, EndpointText]) -> None:
    prompts = PromptBuilder(*endpoints, template="instruct")
    assert not prompts.build([Message(role="user", content="x")], Dial(1.0)).opens_block


def test_a_user_who_writes_the_tag_opens_nothing(
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


def test_a_developer_is_the_system_to_a_template(
    endpoints: tuple[EndpointText, EndpointText],
) -> None:
    prompts = PromptBuilder(*endpoints)
    built = {
        prompts.build([Message(role=role, content="x")], Dial(0.0))
        for role in ("system", "developer")
    }
    assert len(built) == 1


def test_reasoning_of_earlier_turns_reaches_the_template() -> None:
    prompts_template = ChatTemplate(endpoint("{{ messages[0].reasoning_content }}"))
    assert prompts_template.render([{"role": "assistant", "reasoning_content": "r"}]) == "r"


# --- files ---


def write_checkpoint(directory: Path, **files: object) -> Path:
    for name, content in files.items():
        path = directory / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_a_template_may_stand_in_the_tokenizer_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer_config={"chat_template": "T", "bos_token": "<s>"})
    read = EndpointText.read(tmp_path)
    assert (read.chat_template, read.special_tokens) == ("T", {"bos_token": "<s>"})


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    config = {"chat_template": named, "eos_token": {"content": "</s>", "lstrip": False}}
    write_checkpoint(tmp_path, tokenizer_config=config)
    read = EndpointText.read(tmp_path)
    assert (read.chat_template, read.special_tokens) == ("B", {"eos_token": "</s>"})


def test_sampling_defaults_and_ends_come_from_the_generation_config(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path,
        tokenizer_config={"chat_template": "T"},
        generation_config={"temperature": 0.6, "top_k": 20, "eos_token_id": 7, "max_length": 9},
    )
    read = EndpointText.read(tmp_path)
    assert read.sampling_defaults == {"temperature": 0.6, "top_k": 20}
    assert read.eos_token_ids == {7}


def test_a_checkpoint_without_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no chat template"):
        EndpointText.read(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer_config="{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        EndpointText.read(tmp_path)


def test_a_checkpoint_without_tokenizer_json_says_what_to_do(
    tmp_path: Path, instruct_directory: Path
) -> None:
    write_checkpoint(tmp_path, tokenizer_config={"chat_template": "T"})
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        PromptBuilder(EndpointText.read(instruct_directory), EndpointText.read(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/place", "./here", "no-slash", "a/b/c"])
def test_a_directory_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        local_directory(name)


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert local_directory(str(tmp_path)) == tmp_path.resolve()


def test_a_hub_id_brings_weights_and_text_but_no_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[object] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend([name, allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert local_directory("owner/pair") == tmp_path
    name, patterns = asked
    assert name == "owner/pair"
    assert not {"*", "*.bin", "*.py", "*.pt"} & set(patterns)  # type: ignore[call-overload]


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
def continued(
    endpoints: tuple[EndpointText, EndpointText], tmp_path: Path
) -> Callable[..., tuple[str, bool]]:
    """`continued(template, …)`: the text of a prompt that ends in its last message, and whether
    that is inside a think block."""

    def prompt(template: str, content: str = "", reasoning: str | None = None) -> tuple[str, bool]:
        one = replace(endpoints[0], chat_template=template)
        prompts = PromptBuilder(one, one)
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
        (PLAIN_TEMPLATE, ("hi;",), "[assistant]hi;", False),  # said before, by the user
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
def test_a_final_message_ends_where_its_text_does(
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
def test_a_new_turn_is_opened_or_not(
    endpoints: tuple[EndpointText, EndpointText], ending: Ending, end: str
) -> None:
    one = replace(endpoints[0], chat_template=THINKING_TEMPLATE)
    prompts = PromptBuilder(one, one)
    built = prompts.build([Message(role="user", content="hi")], Dial(1.0), ending)
    assert prompts.vocabulary.decode(built.token_ids).endswith(end)
    assert built.opens_block == end.endswith("<think>")


# --- tools ---

ADD = FunctionTool(name="add", description="Adds.", parameters={"type": "object"}, strict=True)


def calling(arguments: str) -> Message:
    call = ToolCall(id="c", function=CalledFunction(name="add", arguments=arguments))
    return Message(role="assistant", tool_calls=[call])


def test_a_template_shows_whether_it_has_a_place_for_tools() -> None:
    assert ChatTemplate(endpoint("{% if tools %}{{ tools }}{% endif %}")).takes_tools
    assert not ChatTemplate(endpoint("{{ messages }}{% set tools = 1 %}")).takes_tools


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
    deaf = replace(endpoints[0], chat_template="{{ messages[0].content }}")
    prompts = PromptBuilder(deaf, deaf)
    with pytest.raises(InvalidRequest) as caught:
        prompts.build([Message(role="user", content="hi")], Dial(0.0), tools=[ADD])
    assert caught.value.param == "tools"
    prompts.build([Message(role="user", content="hi")], Dial(0.0))


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [('{"a": "é"}', '{"a":"é"}'), ("[1]", '"[1]"'), ("{nonsense", '"{nonsense"')],
)
def test_arguments_of_a_call_are_an_object_to_the_template_where_they_are_one(
    endpoints: tuple[EndpointText, EndpointText], arguments: str, seen: str
) -> None:
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson | replace(': ', ':') }}"
    prompts = PromptBuilder(*[replace(endpoints[0], chat_template=template)] * 2)
    prompt = prompts.build([calling(arguments)], Dial(0.0))
    assert prompts.vocabulary.tokenizer.decode(list(prompt.token_ids)) == seen


def test_a_call_and_its_answer_are_rendered_in_turn(
    endpoints: tuple[EndpointText, EndpointText],
) -> None:
    prompts = PromptBuilder(*endpoints)
    answer = Message(role="tool", tool_call_id="c", content="6")
    messages = [Message(role="user", content="hi"), calling('{"a":1}'), answer]
    text = prompts.vocabulary.tokenizer.decode(list(prompts.build(messages, Dial(0.0)).token_ids))
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\n6\n</tool_response>" in text
