"""Encodes and decodes text: one tokenizer for both endpoints, and incremental detokenization.

It reads `tokenizer.json` through the `tokenizers` library. It knows no templates and no requests.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from tokenizers import Encoding, Tokenizer
from tokenizers.decoders import DecodeStream

from mi_runtime.config import GrammarVocabulary, TokenMarks
from server.text.checkpoint import CheckpointError
from server.text.reasoning_parser import THINK_CLOSE, THINK_OPEN, TOOL_CALL, TOOL_CALL_END

SENTENCE_ENDS: Final = (".", "!", "?", "…", "。", "！", "？")
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """A loaded tokenizer. Safe to use from several threads, because nothing changes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.think_open_id: int | None = tokenizer.token_to_id(THINK_OPEN)
        self.think_close_id: int | None = tokenizer.token_to_id(THINK_CLOSE)

    @classmethod
    def load(cls, directory: Path) -> "Vocabulary":
        """Reads the tokenizer of a checkpoint. Raises `CheckpointError`."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{directory}: no tokenizer.json; a tokenizer in another format must be converted "
                "first (AutoTokenizer.from_pretrained(…).save_pretrained(…) writes it)"
            )
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from error

    @property
    def has_think_tags(self) -> bool:
        """Whether both tags of the think block are single tokens."""
        return self.think_open_id is not None and self.think_close_id is not None

    @cached_property
    def tags(self) -> dict[int, str]:
        """The tags that are single tokens, by id."""
        tags = (THINK_OPEN, THINK_CLOSE, TOOL_CALL, TOOL_CALL_END)
        ids = {tag: self.tokenizer.token_to_id(tag) for tag in tags}
        return {index: tag for tag, index in ids.items() if index is not None}

    @cached_property
    def close_aliases(self) -> frozenset[int]:
        """Ids of tokens that close an open think block like its closing tag."""
        return frozenset(index for index, tag in self.tags.items() if tag == TOOL_CALL)

    @cached_property
    def closing_tags(self) -> tuple[str, ...]:
        """The tags that close an open think block, as text."""
        return (THINK_CLOSE, TOOL_CALL) if self.close_aliases else (THINK_CLOSE,)

    @cached_property
    def hidden_tags(self) -> dict[int, str]:
        """The tags, by id, that decoding would leave out because they are special tokens."""
        return {index: tag for index, tag in self.tags.items() if index in self._special_token_ids}

    @cached_property
    def marks(self) -> TokenMarks:
        """What each token's text means for think blocks; a token without text counts as whitespace.

        A full stop inside a number counts as the end of a sentence, as the token alone cannot show
        the difference.
        """
        ids = sorted(self.tokenizer.get_vocab(with_added_tokens=True).values())
        texts = self.tokenizer.decode_batch([[index] for index in ids], skip_special_tokens=True)
        with_text = [pair for pair in zip(ids, texts, strict=True) if pair[0] not in self.tags]
        return TokenMarks(
            soft_ends=frozenset(
                index for index, text in with_text if text.endswith(("\n", *SENTENCE_ENDS))
            ),
            whitespace=frozenset(index for index, text in with_text if not text.strip()),
        )

    def encoding(self, text: str, *, add_special_tokens: bool) -> Encoding:
        """Returns the ids of a text, and where the text of each begins and ends, in characters."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def grammar_vocabulary(
        self, directory: Path, eos_token_ids: Iterable[int]
    ) -> GrammarVocabulary | None:
        """Returns what the engine needs for grammars, or None if no known token ends an answer."""
        known = [it for it in sorted(eos_token_ids) if self.tokenizer.id_to_token(it) is not None]
        if not known:
            return None
        return GrammarVocabulary(str(directory / "tokenizer.json"), tuple(known))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of a text, at half the cost of `encoding` and without holding the GIL.

        A rendered prompt has its special tokens already, so they are not added by default.
        """
        (encoding,) = self.tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of tokens, special ones included."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def token_text(self, token_id: int) -> str:
        """Returns the text of one token; an incomplete character becomes U+FFFD."""
        text: str = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the exact bytes of one token, which may be part of a character."""
        token = self.tokenizer.id_to_token(token_id)
        if token is None or token_id in self._added_token_ids:
            return self.token_text(token_id).encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else self.token_text(token_id).encode()

    @cached_property
    def _added_token_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    @cached_property
    def _special_token_ids(self) -> frozenset[int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def _is_byte_level(self) -> bool:
        symbols = self.tokenizer.get_vocab(with_added_tokens=False)
        return "ByteLevel" in str(self.tokenizer.decoder) and all(
            symbol in _BYTE_OF_SYMBOL for token in symbols for symbol in token
        )


class IncrementalDetokenizer:
    """Turns the tokens of one answer into text, one complete character at a time."""

    def __init__(self, vocabulary: Vocabulary, *, hide_special: bool = True) -> None:
        self._tokenizer = vocabulary.tokenizer
        self._hide_special = hide_special
        self._tags = vocabulary.hidden_tags if hide_special else {}
        self._stream = DecodeStream(skip_special_tokens=hide_special)
        self._pending: list[int] = []  # tokens whose text is not complete

    def feed(self, token_id: int) -> str:
        """Returns the text that is complete with this token; it may be empty."""
        if token_id in self._tags:
            return self.finish() + self._tags[token_id]
        text: str | None = self._stream.step(self._tokenizer, token_id)
        if text is None:
            self._pending.append(token_id)
            return ""
        if self._pending:
            self._pending.clear()
        return text

    def finish(self) -> str:
        """Returns the text of a character that stays incomplete."""
        if not self._pending:
            return ""
        text: str = self._tokenizer.decode(self._pending, skip_special_tokens=self._hide_special)
        self._pending.clear()
        self._stream = DecodeStream(skip_special_tokens=self._hide_special)
        return text


def _byte_symbols() -> dict[str, int]:
    """Returns the byte that each printable symbol stands for in byte-level vocabularies (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_SYMBOL: Final = _byte_symbols()
