"""What an engine was told of its vocabulary, once for all requests."""

from mi_runtime.config import TokenMarks
from mi_runtime.request import Dial, EngineRequest, Phase, ThinkPolicy
from mi_runtime.scheduling.sequence import Sequence
from mi_runtime.scheduling.thinking import ThinkingState

OPEN, CLOSE, STOP, BLANK, WORD = 1, 2, 3, 4, 5
MARKS = TokenMarks(soft_ends=frozenset({STOP}), blanks=frozenset({BLANK}))


def after(tokens: list[int], policy: ThinkPolicy) -> ThinkingState:
    state = ThinkingState(policy, MARKS)
    for token in tokens:
        state.observe(token)
    return state


def test_blanks_may_stand_before_the_open_tag() -> None:
    assert after([BLANK, BLANK, OPEN], ThinkPolicy(OPEN, CLOSE)).phase is Phase.INSIDE


def test_once_the_answer_has_begun_an_open_tag_in_it_is_text() -> None:
    state = after([BLANK, WORD, OPEN, WORD], ThinkPolicy(OPEN, CLOSE, cap=0))
    assert (state.phase, state.reasoning_tokens) == (Phase.CLOSED, 0)
    assert state.forced_token is None


def test_a_block_closes_early_at_one_of_the_engines_soft_ends() -> None:
    policy = ThinkPolicy(OPEN, CLOSE, opened_by_prompt=True, cap=9, soft_window=8)
    assert after([WORD, WORD], policy).forced_token is None
    assert after([WORD, STOP], policy).forced_token == CLOSE


def test_a_sequence_hands_the_marks_on() -> None:
    think = ThinkPolicy(OPEN, CLOSE, cap=0)
    sequence = Sequence(EngineRequest("r", (7,), Dial(0.5), think=think), MARKS)
    sequence.append(WORD)
    sequence.append(OPEN)
    assert sequence.forced_token is None
