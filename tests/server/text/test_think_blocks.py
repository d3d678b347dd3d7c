"""The operator's rules for think blocks become the policy that the engine follows."""

import pytest
from tokenizers import Tokenizer

from mi_runtime.embedded_pair.tokenizer import build_tokenizer
from mi_runtime.request import Phase, TokenEvent
from server.config import ConfigError
from server.text.reasoning_parser import Split, TextSplitter
from server.text.think_blocks import ThinkBlocks
from server.text.vocabulary import Vocabulary
from tests.server.tag_tokens import tokenizer_with_tags, without_think_tokens

VOCABULARY = Vocabulary(build_tokenizer())
CLOSING = "\n</think>\n\n"


def blocks(closing: str = CLOSING, soft_window: int | None = None) -> ThinkBlocks:
    return ThinkBlocks.of(VOCABULARY, closing=closing, soft_window=soft_window)


def test_a_policy_has_the_tags_the_cap_and_the_closing_sequence() -> None:
    policy = blocks().policy(opened_by_prompt=True, cap=7)
    assert policy is not None
    assert (policy.opened_by_prompt, policy.cap) == (True, 7)
    assert VOCABULARY.token_text(policy.open_id) == "<think>"
    assert VOCABULARY.token_text(policy.close_id) == "</think>"
    assert list(policy.closing) == VOCABULARY.encode(CLOSING)


@pytest.mark.parametrize(
    ("cap", "setting", "window"),
    [
        (None, None, 0),
        (0, None, 0),
        (9, None, 0),
        (100, None, 10),
        (5000, None, 64),
        (100, 0, 0),
        (100, 30, 30),
        (20, 30, 20),
    ],
)
def test_the_soft_window_is_a_tenth_of_the_cap_or_as_the_operator_says(
    cap: int | None, setting: int | None, window: int
) -> None:
    policy = blocks(soft_window=setting).policy(opened_by_prompt=True, cap=cap)
    assert policy is not None
    assert policy.soft_window == window


@pytest.mark.parametrize("closing", ["\n\n", "</think></think>", "<think></think>", "</thin k>"])
def test_a_closing_sequence_must_have_the_closing_tag_once_and_no_other_tag(closing: str) -> None:
    with pytest.raises(ConfigError, match="think_closing"):
        blocks(closing)


def test_a_closing_sequence_may_contain_text() -> None:
    text = "\nTime is up.\n</think>\n\n"
    assert VOCABULARY.tokenizer.decode(list(blocks(text).closing)) == text


def test_a_tool_call_tag_that_is_a_token_closes_a_block_too() -> None:
    vocabulary = Vocabulary(tokenizer_with_tags("<tool_call>"))
    policy = ThinkBlocks.of(vocabulary, closing=CLOSING, soft_window=None).policy(
        opened_by_prompt=False, cap=None
    )
    assert policy is not None
    assert policy.close_aliases == set(vocabulary.encode("<tool_call>"))
    plain = blocks().policy(opened_by_prompt=False, cap=None)
    assert plain is not None
    assert not plain.close_aliases


def test_with_tools_the_tool_call_tag_closes_no_block() -> None:
    tokenizer = tokenizer_with_tags("<tool_call>")
    rules = ThinkBlocks.of(Vocabulary(tokenizer), closing=CLOSING, soft_window=None)
    policy = rules.policy(opened_by_prompt=True, cap=None, tools=True)
    assert policy is not None
    assert not policy.close_aliases
    splitter = rules.splitter(opened_by_prompt=True, tools=True)
    tag = TokenEvent("r", tokenizer.token_to_id("<tool_call>"), phase=Phase.INSIDE)
    assert splitter.feed("<tool_call>", tag) == Split(reasoning="<tool_call>")
    assert splitter.inside_block


@pytest.mark.parametrize(
    ("closing", "tail"),
    [(CLOSING, "\n\n"), ("</think>", ""), ("\n</think>\n\nAnswer: ", ""), ("</think> \n", "")],
)
def test_a_block_before_a_grammar_must_close_without_text(closing: str, tail: str) -> None:
    policy = blocks(closing).policy(opened_by_prompt=True, cap=7, constrained=True)
    assert policy is not None
    assert policy.forbid_eos
    assert VOCABULARY.tokenizer.decode(list(policy.tail)) == tail
    free = blocks(closing).policy(opened_by_prompt=True, cap=7)
    assert free is not None
    assert not free.forbid_eos
    assert free.closing == blocks(closing).closing


def test_without_tags_that_are_tokens_the_engine_has_no_policy() -> None:
    tokenizer: Tokenizer = Tokenizer.from_str(without_think_tokens(build_tokenizer().to_str()))
    rules = ThinkBlocks.of(Vocabulary(tokenizer), closing="anything", soft_window=None)
    assert rules.policy(opened_by_prompt=True, cap=7) is None
    assert isinstance(rules.splitter(opened_by_prompt=True), TextSplitter)
