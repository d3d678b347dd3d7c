"""Log-probabilities of a text answer are columns of numbers that JSON can write."""

from mi_runtime.request import TokenLogprobs
from server.answer.logprobs import columns, completions_logprobs
from server.text.vocabulary import Vocabulary


def test_an_impossible_token_has_a_number_json_can_write(vocabulary: Vocabulary) -> None:
    write = completions_logprobs(vocabulary)
    rows = [write(5, TokenLogprobs(float("-inf"), ((6, -0.0),)), 3)]
    assert columns(rows)["token_logprobs"] == [-9999.0]
    assert list(rows[0]["top_logprobs"].values()) == [0.0, -9999.0]
