"""A chat template renders as in transformers, and reaches nothing outside its sandbox."""

from pathlib import Path

import pytest

from server.text.chat_template import ChatTemplate
from server.text.checkpoint import CheckpointError, EndpointText
from server.wire.errors import InvalidRequest


def endpoint(template: str) -> EndpointText:
    """Returns an endpoint with this chat template and no files."""
    return EndpointText(Path("nowhere"), template, {"eos_token": "<eos>"}, frozenset())


def render(template: str, text: str = "hi") -> str:
    return ChatTemplate(endpoint(template)).render([{"role": "user", "content": text}])


def test_a_template_sees_messages_and_special_tokens() -> None:
    assert render("{{ messages[0].content }}{{ eos_token }}{{ add_generation_prompt }}") == (
        "hi<eos>True"
    )


def test_template_blocks_are_trimmed_as_in_transformers() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_loop_controls_work() -> None:
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(loop) == "01"


def test_tojson_keeps_letters_and_does_not_escape_html() -> None:
    assert render("{{ messages[0] | tojson }}", "é<&>") == '{"role": "user", "content": "é<&>"}'


def test_a_generation_block_renders_its_content() -> None:
    assert render("a{% generation %}b{% endgeneration %}c") == "abc"


def test_a_template_may_write_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}").startswith("20")


def test_an_exception_that_a_template_raises_is_an_error_of_the_messages() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


def test_a_template_reaches_nothing_outside_its_sandbox() -> None:
    with pytest.raises(InvalidRequest):
        render("{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_a_template_that_does_not_parse_is_an_error_of_the_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="does not parse"):
        render("{% if %}")


def test_reasoning_of_earlier_turns_reaches_the_template() -> None:
    template = ChatTemplate(endpoint("{{ messages[0].reasoning_content }}"))
    assert template.render([{"role": "assistant", "reasoning_content": "r"}]) == "r"


def test_a_template_shows_whether_it_has_a_place_for_tools() -> None:
    assert ChatTemplate(endpoint("{% if tools %}{{ tools }}{% endif %}")).takes_tools
    assert not ChatTemplate(endpoint("{{ messages }}{% set tools = 1 %}")).takes_tools
