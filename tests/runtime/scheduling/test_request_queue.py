"""A request queue lists its sequences by priority, then by arrival."""

import random

from hypothesis import given
from hypothesis import strategies as st

from mi_runtime.request import Dial, EngineRequest
from mi_runtime.scheduling.request_queue import RequestQueue
from mi_runtime.scheduling.sequence import Sequence


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=30), st.randoms())
def test_a_request_queue_stays_sorted(moves: list[tuple[int, bool]], rng: random.Random) -> None:
    queue, inside = RequestQueue(), list[Sequence]()
    for arrival, (priority, leave) in enumerate(moves):
        if leave and inside:
            queue.remove(inside.pop(rng.randrange(len(inside))))
        sequence = Sequence(EngineRequest(str(arrival), (5,), Dial(0.5)))
        sequence.rank = (priority, arrival)
        queue.add(sequence)
        inside.append(sequence)
        assert [*queue] == sorted(inside, key=lambda one: one.rank)
        assert [queue.first, queue.last] == [next(iter(queue)), [*queue][-1]]
