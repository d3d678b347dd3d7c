"""An echo has the text of its prompt, and the place of each token in it."""

from server.answer.echo import Echo
from server.text.vocabulary import Vocabulary


def test_token_ids_are_echoed_with_special_tokens_and_offsets_count_characters(
    vocabulary: Vocabulary,
) -> None:
    text = "é<|im_end|>ü7"  # letters of two bytes and two tokens each
    echo = Echo.of_tokens(vocabulary.encode(text), vocabulary)
    assert echo.text == text
    assert [text[offset] for offset in echo.offsets] == ["é", "é", "<", "ü", "ü", "7"]


def test_an_incomplete_character_is_echoed_as_a_replacement_character(
    vocabulary: Vocabulary,
) -> None:
    echo = Echo.of_tokens(vocabulary.encode("aé")[:2], vocabulary)
    assert (echo.text, list(echo.offsets)) == ("a�", [0, 1])
