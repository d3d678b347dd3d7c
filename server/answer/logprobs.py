"""Writes log-probabilities: as entries for chat, and as columns for `/v1/completions`."""

from collections.abc import Callable
from typing import Any, Final

from mi_runtime.request import TokenLogprobs
from server.text.vocabulary import Vocabulary

LOWEST_LOGPROB: Final = -9999.0  # JSON has no infinity

WriteLogprobs = Callable[[int, TokenLogprobs, int], dict[str, Any]]
"""Makes the entry of a token from its id, its log-probabilities, and the offset of its text in
characters."""


def chat_logprobs(vocabulary: Vocabulary) -> WriteLogprobs:
    """Returns a writer of entries of `logprobs.content`."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": vocabulary.token_text(token_id),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(vocabulary.token_bytes(token_id)),
        }

    def write(token_id: int, logprobs: TokenLogprobs, offset: int) -> dict[str, Any]:
        top = [token(other, value) for other, value in logprobs.top]
        return {**token(token_id, logprobs.token), "top_logprobs": top}

    return write


def completions_logprobs(vocabulary: Vocabulary) -> WriteLogprobs:
    """Returns a writer of rows, which `columns` transposes.

    `top_logprobs` always contains the token itself, even if it is not among the best. Tokens that
    decode to the same text, which parts of characters may, share one entry with the best value.
    """

    def write(token_id: int, logprobs: TokenLogprobs, offset: int) -> dict[str, Any]:
        top: dict[str, float] = {}
        for other, value in (*logprobs.top, (token_id, logprobs.token)):
            top.setdefault(vocabulary.token_text(other), max(value, LOWEST_LOGPROB))
        return {
            "tokens": vocabulary.token_text(token_id),
            "token_logprobs": max(logprobs.token, LOWEST_LOGPROB),
            "top_logprobs": top,
            "text_offset": offset,
        }

    return write


def row_without_logprobs(token_text: str, offset: int) -> dict[str, Any]:
    """Returns the row of a prompt's first token, which nothing precedes."""
    return {
        "tokens": token_text,
        "token_logprobs": None,
        "top_logprobs": None,
        "text_offset": offset,
    }


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Turns rows into one list for each field."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [row[name] for row in rows] for name in names}
