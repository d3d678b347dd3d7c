import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mi_runtime.request import FinishReason, TokenEvent
from server.engine.generation import Generation
from server.wire.errors import DeadlineExceeded

LATE = DeadlineExceeded("late")


class Released:
    """What the engine client receives: (request id, whether the engine still works on it)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, request_id: str, engine_works_on_it: bool) -> None:
        self.calls.append((request_id, engine_works_on_it))


def play(scenario: Callable[[Generation, Released], Coroutine[Any, Any, None]]) -> None:
    async def scenario_with_a_generation() -> None:
        released = Released()
        await scenario(Generation(["a", "b"], released), released)

    asyncio.run(asyncio.wait_for(scenario_with_a_generation(), 20))


def token(request_id: str, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(request_id, 1, finish)


def test_a_failure_stops_the_engine_though_nobody_takes() -> None:
    async def scenario(generation: Generation, released: Released) -> None:
        generation.push(0.0, token("a", FinishReason.STOP))
        generation.fail(LATE)
        assert released.calls == [("a", False), ("b", True)]

    play(scenario)


def test_what_came_before_a_failure_is_taken_first() -> None:
    async def scenario(generation: Generation, _: Released) -> None:
        generation.push(0.0, token("a"))
        generation.fail(LATE)
        with generation:
            assert len(await generation.take()) == 1
            assert generation.is_open
            with pytest.raises(DeadlineExceeded):
                await generation.take()

    play(scenario)


def test_a_complete_answer_cannot_fail_any_more() -> None:
    async def scenario(generation: Generation, _: Released) -> None:
        for request_id in ("a", "b"):
            generation.push(0.0, token(request_id, FinishReason.STOP))
        generation.fail(LATE)
        assert len(await generation.take()) == 2
        assert not generation.is_open

    play(scenario)


def test_an_answer_expires_while_it_is_waited_for() -> None:
    async def scenario(generation: Generation, released: Released) -> None:
        generation.fail_after(0.01, LATE)
        with pytest.raises(DeadlineExceeded), generation:
            await generation.take()
        assert sorted(released.calls) == [("a", True), ("b", True)]

    play(scenario)


def test_the_end_of_an_answer_stops_its_clock() -> None:
    async def scenario(generation: Generation, released: Released) -> None:
        generation.fail_after(60, LATE)
        timer = generation._expiry
        with generation:
            pass
        assert timer is not None
        assert timer.cancelled()
        assert len(released.calls) == 2

    play(scenario)
