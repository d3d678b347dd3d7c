"""The vocabulary and the chat template are the same as built, as shipped and in every library."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.embedded_pair.task import draw_questions, think_answer
from mi_runtime.embedded_pair.tokenizer import (
    CHAT_TEMPLATE,
    VOCABULARY_SIZE,
    WHOLE_WORDS,
    build_tokenizer,
    prompt_text,
    save_tokenizer,
)

TOKENIZER = build_tokenizer()
THINKING_TURN = {"role": "assistant", "content": "<think>\na=1\n</think>\n\nAnswer: 1"}


class TemplateRefusal(Exception):
    """The error that the template raises by `raise_exception`."""


def refuse(message: str) -> None:
    raise TemplateRefusal(message)


def render(messages: list[dict[str, Any]], **variables: Any) -> str:
    """Renders with plain jinja2, as an HTTP server does, without transformers."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(CHAT_TEMPLATE)
    known = {"add_generation_prompt": True, "tools": None, "bos_token": None, "eos_token": None}
    return template.render(messages=messages, raise_exception=refuse, **{**known, **variables})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    tokens = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["e\u0301 is not é", "\u212b", " \t\r\n ", "日本語 🧠", "\x00"])
def test_text_that_normalization_would_change_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@pytest.mark.parametrize("word", WHOLE_WORDS)
def test_each_word_of_the_list_is_one_token(word: str) -> None:
    assert len(TOKENIZER.encode(word).ids) == 1


def test_each_character_of_the_chain_is_one_token() -> None:
    for question in draw_questions(Random(0), 20):
        assert TOKENIZER.encode(question.text).tokens == list(question.text.replace(" ", "Ġ"))


def test_the_added_tokens_are_the_last_ids_and_think_tags_are_not_special() -> None:
    added = TOKENIZER.get_added_tokens_decoder()
    assert {token: (kept.content, kept.special) for token, kept in added.items()} == {
        315: ("<|endoftext|>", True),
        316: ("<|im_start|>", True),
        317: ("<|im_end|>", True),
        318: ("<think>", False),
        319: ("</think>", False),
    }
    assert TOKENIZER.get_vocab_size() == VOCABULARY_SIZE


def test_think_tags_survive_skipping_special_tokens() -> None:
    (question,) = draw_questions(Random(3), 1)
    answer = think_answer(question)
    tokens = TOKENIZER.encode(answer + "<|im_end|>").ids
    assert tokens.count(318) == tokens.count(319) == 1
    assert TOKENIZER.decode(tokens, skip_special_tokens=True) == answer


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_the_training_prompt_is_what_the_template_renders(system: str | None) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    assert render([*messages, user("a=1. a?")]) == prompt_text("a=1. a?", system)


def test_the_generation_prompt_opens_no_think_block() -> None:
    assert render([user("hi")]).endswith("<|im_start|>assistant\n")
    assert not render([user("hi")], add_generation_prompt=False).endswith("assistant\n")


def test_think_blocks_of_earlier_turns_are_stripped() -> None:
    rendered = render([user("a=1. a?"), THINKING_TURN, user("a=2. a?")])
    assert rendered == (
        "<|im_start|>user\na=1. a?<|im_end|>\n"
        "<|im_start|>assistant\nAnswer: 1<|im_end|>\n"
        "<|im_start|>user\na=2. a?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_continued_answer_keeps_its_think_block() -> None:
    rendered = render([user("a=1. a?"), THINKING_TURN], add_generation_prompt=False)
    assert THINKING_TURN["content"] in rendered


def test_reasoning_content_of_the_last_turn_becomes_its_think_block() -> None:
    turn = {"role": "assistant", "content": "Answer: 1", "reasoning_content": "a=1"}
    assert "<think>\na=1\n</think>\n\nAnswer: 1<|im_end|>" in render([user("a=1. a?"), turn])
    assert "<think>" not in render([user("a=1. a?"), turn, user("a=2. a?")])


def test_content_may_come_in_text_parts() -> None:
    parts = [{"type": "text", "text": "a=1. "}, {"type": "text", "text": "a?"}]
    assert render([{"role": "user", "content": parts}]) == prompt_text("a=1. a?")


def test_tools_calls_and_results_are_all_rendered() -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    rendered = render(
        [
            user("a=1. a?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
        ],
        tools=[{"type": "function", "function": {"name": "add"}}],
    )
    assert '"name": "add"' in rendered
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in rendered
    assert "<tool_response>\n1\n</tool_response>" in rendered


def test_an_unknown_role_is_refused_not_dropped() -> None:
    with pytest.raises(TemplateRefusal, match="critic"):
        render([{"role": "critic", "content": "no"}])


@pytest.fixture(params=["instruct", "thinking", "built"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Returns the directory of a tokenizer, built or shipped."""
    if request.param == "built":
        save_tokenizer(tmp_path)
        yield tmp_path
    else:
        yield INSTRUCT_DIRECTORY if request.param == "instruct" else THINKING_DIRECTORY


def test_the_saved_files_load_in_both_libraries_and_agree(directory: Path) -> None:
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert plain.to_str() == TOKENIZER.to_str()
    auto = AutoTokenizer.from_pretrained(directory)
    text = "a=1,b=a+2. b? e\u0301 <think>\n</think>"
    assert auto(text)["input_ids"] == plain.encode(text).ids
    assert (auto.eos_token_id, auto.pad_token_id) == (317, 315)
    assert auto.decode(plain.encode(text).ids, skip_special_tokens=True) == text


def test_transformers_renders_the_template_as_plain_jinja_does(directory: Path) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        user("a=1. a?"),
        THINKING_TURN,
        user("a=2. a?"),
    ]
    auto = AutoTokenizer.from_pretrained(directory)
    rendered = auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == render(messages)
