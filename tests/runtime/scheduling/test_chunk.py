"""A chunk derives what its step must do: sample, score, and at which dial it runs."""

import pytest

from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.sequence import Sequence


def sequence(prompt_logprobs: int | None = None) -> Sequence:
    """Returns a sequence of six known tokens."""
    sampling = SamplingParams(prompt_logprobs=prompt_logprobs)
    return Sequence(EngineRequest("r", (3, 4, 5, 6, 7, 8), Dial(0.5), sampling, None))


@pytest.mark.parametrize(
    ("start", "length", "samples"), [(0, 5, False), (0, 6, True), (5, 1, True), (6, 1, True)]
)
def test_a_chunk_samples_if_it_reaches_the_last_known_token(
    start: int, length: int, samples: bool
) -> None:
    assert Chunk(sequence(), start, length).samples is samples


@pytest.mark.parametrize(
    ("start", "length", "scored"), [(0, 3, [0, 1, 2]), (3, 3, [3, 4]), (5, 1, [])]
)
def test_a_chunk_scores_its_prompt_positions_but_the_last(
    start: int, length: int, scored: list[int]
) -> None:
    assert list(Chunk(sequence(prompt_logprobs=0), start, length).scored) == scored
    assert not Chunk(sequence(), start, length).scored


def test_a_chunk_in_which_the_dial_switches_has_none() -> None:
    request = EngineRequest("r", (3, 4, 5, 6, 7, 8), Dial(0.5), answer_dial=Dial(0.1))
    switched = Sequence(request)
    switched.switch_at = 4
    dials = [Chunk(switched, start, 2).dial for start in (2, 3, 4)]
    assert dials == [Dial(0.5), None, Dial(0.1)]
