"""A sequence derives its output, its limits and its random numbers from its request and tokens."""

from mi_runtime.config import TokenMarks
from mi_runtime.request import Dial, EngineRequest, SamplingParams, ThinkPolicy
from mi_runtime.scheduling.sequence import Sequence


def sequence(sampling: SamplingParams | None = None) -> Sequence:
    return Sequence(EngineRequest("r", (4, 5, 6), Dial(0.5), sampling or SamplingParams()))


def test_a_new_sequence_has_its_prompt_and_nothing_computed() -> None:
    new = sequence()
    assert (new.tokens, new.output_length) == ([4, 5, 6], 0)
    assert (new.computed, new.remaining, len(new)) == (0, 3, 3)


def test_sampled_tokens_are_the_output() -> None:
    grown = sequence()
    grown.append(7)
    grown.append(8)
    assert (grown.tokens, grown.output_length, len(grown)) == ([4, 5, 6, 7, 8], 2, 5)


def test_ends_are_forbidden_before_min_tokens() -> None:
    short = sequence(SamplingParams(min_tokens=1))
    assert short.forbids_ending
    short.append(7)
    assert not short.forbids_ending
    assert not sequence().forbids_ending


def test_a_sequence_tracks_its_think_block_with_the_engines_marks() -> None:
    """With these marks, the answer has begun before the open tag, which is then text."""
    request = EngineRequest("r", (4,), Dial(0.5), think=ThinkPolicy(open_id=1, close_id=2, cap=0))
    marked = Sequence(request, TokenMarks(whitespace=frozenset({3})))
    unmarked = Sequence(request)
    for each in (marked, unmarked):
        each.append(7)
        each.append(1)
    assert (marked.forced_token, unmarked.forced_token) == (None, 2)


def test_a_seed_decides_the_random_numbers() -> None:
    one, two = (sequence(SamplingParams(seed=3)) for _ in range(2))
    assert one.rng.random() == two.rng.random()


def test_without_a_seed_two_sequences_draw_different_numbers() -> None:
    assert sequence().rng.random() != sequence().rng.random()


def test_a_sequence_that_never_ran_has_no_waiting_time() -> None:
    assert sequence().queue_seconds == 0.0
