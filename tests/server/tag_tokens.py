"""Tokenizers in which tags are tokens, or are spelled letter by letter."""

from tokenizers import Tokenizer

from mi_runtime.embedded_pair.tokenizer import build_tokenizer


def tokenizer_with_tags(*tags: str) -> Tokenizer:
    """Returns the embedded pair's tokenizer with a token for each of these tags."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(tags))
    return tokenizer


def without_think_tokens(tokenizer_json: str) -> str:
    """Returns a `tokenizer.json` in which the think tags are no tokens any more."""
    return tokenizer_json.replace('"<think>"', '"<other>"').replace('"</think>"', '"</other>"')
