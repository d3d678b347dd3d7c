"""Token ids become text one by one, with whole characters and without special tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from mi_runtime.embedded_pair.tokenizer import build_tokenizer
from server.text.vocabulary import IncrementalDetokenizer, Vocabulary
from tests.server.tag_tokens import tokenizer_with_tags

VOCABULARY = Vocabulary(build_tokenizer())
TOKENS = st.lists(st.integers(0, VOCABULARY.size - 1), max_size=30)


def detokenized(vocabulary: Vocabulary, ids: list[int]) -> str:
    """Returns the text of these tokens, decoded one by one."""
    text = IncrementalDetokenizer(vocabulary)
    return "".join([*(text.feed(token_id) for token_id in ids), text.finish()])


@given(st.text(max_size=30))
def test_any_text_is_decoded_token_by_token(text: str) -> None:
    assert detokenized(VOCABULARY, VOCABULARY.encode(text)) == VOCABULARY.tokenizer.decode(
        VOCABULARY.encode(text)
    )


@given(TOKENS)
def test_tokens_decoded_one_by_one_give_the_text_of_all(ids: list[int]) -> None:
    assert detokenized(VOCABULARY, ids) == VOCABULARY.tokenizer.decode(ids)


@given(TOKENS)
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(ids: list[int]) -> None:
    joined = b"".join(VOCABULARY.token_bytes(token_id) for token_id in ids)
    text = VOCABULARY.tokenizer.decode(ids, skip_special_tokens=False)
    assert joined.decode(errors="replace") == text


def test_a_character_of_several_tokens_appears_with_its_last_one() -> None:
    text = IncrementalDetokenizer(VOCABULARY)
    pieces = [text.feed(token_id) for token_id in VOCABULARY.encode("🙂")]
    assert pieces == ["", "", "", "🙂"]


def test_an_incomplete_character_becomes_a_replacement_character() -> None:
    text = IncrementalDetokenizer(VOCABULARY)
    assert text.feed(VOCABULARY.encode("🙂")[0]) == ""
    assert text.finish() == "\ufffd"


def test_special_tokens_are_hidden() -> None:
    assert detokenized(VOCABULARY, VOCABULARY.encode("a<|im_end|>b")) == "ab"


@pytest.mark.parametrize("special", [True, False])
def test_think_tags_are_shown_even_if_they_are_special_tokens(special: bool) -> None:
    tokenizer: Tokenizer = build_tokenizer()
    if special:
        tokenizer.add_special_tokens(
            [AddedToken(tag, special=True) for tag in ("<think>", "</think>")]
        )
    vocabulary = Vocabulary(tokenizer)
    assert bool(vocabulary.hidden_tags) is special
    assert detokenized(vocabulary, vocabulary.encode("<think>é</think>b")) == "<think>é</think>b"


def test_a_tool_call_tag_closes_a_block_only_where_it_is_a_token() -> None:
    assert VOCABULARY.closing_tags == ("</think>",)
    assert Vocabulary(tokenizer_with_tags("<tool_call>")).closing_tags == (
        "</think>",
        "<tool_call>",
    )


def test_whitespace_tokens_and_soft_ends_are_found_by_their_text() -> None:
    marks = VOCABULARY.marks
    assert marks.whitespace is not None
    texts = {text: VOCABULARY.encode(text)[0] for text in ("\n", "\n\n", " ", ".", "?", "a", "=")}
    assert {text for text, token_id in texts.items() if token_id in marks.soft_ends} == {
        *("\n", "\n\n", ".", "?")
    }
    assert {text for text, token_id in texts.items() if token_id in marks.whitespace} == {
        *("\n", "\n\n", " ")
    }


def test_tags_are_neither_whitespace_nor_the_end_of_a_sentence_though_they_may_be_hidden() -> None:
    tokenizer: Tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<think>", special=True)])
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.marks.whitespace is not None
    assert not vocabulary.tags.keys() & (vocabulary.marks.whitespace | vocabulary.marks.soft_ends)
    assert set(vocabulary.encode("<|im_end|>")) <= vocabulary.marks.whitespace
