"""One sequence: the facts derived from its tokens, and its source of randomness."""

from mi_runtime.request import Dial, EngineRequest, SamplingParams, ThinkPolicy
from mi_runtime.scheduling.sequence import Sequence


def sequence(sampling: SamplingParams | None = None, think: ThinkPolicy | None = None) -> Sequence:
    return Sequence(EngineRequest("r", (4, 5, 6), Dial(0.5), sampling or SamplingParams(), think))


def test_a_new_sequence_is_its_prompt_and_nothing_is_computed() -> None:
    new = sequence()
    assert (new.tokens, new.output, new.output_length) == ([4, 5, 6], [], 0)
    assert (new.computed, new.remaining, len(new)) == (0, 3, 3)


def test_sampled_tokens_are_the_output() -> None:
    grown = sequence()
    grown.append(7)
    grown.append(8)
    assert (grown.output, grown.output_length, len(grown)) == ([7, 8], 2, 5)


def test_ending_is_forbidden_until_min_tokens_are_there() -> None:
    short = sequence(SamplingParams(min_tokens=1))
    assert short.forbids_ending
    short.append(7)
    assert not short.forbids_ending
    assert not sequence().forbids_ending


def test_a_seed_decides_the_random_numbers() -> None:
    one, two = (sequence(SamplingParams(seed=3)) for _ in range(2))
    assert one.rng.random() == two.rng.random()


def test_without_a_seed_two_sequences_draw_different_numbers() -> None:
    assert sequence().rng.random() != sequence().rng.random()


def test_a_sequence_that_never_ran_has_waited_for_nothing() -> None:
    assert sequence().queue_seconds == 0.0
