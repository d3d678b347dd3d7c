"""A generation hands over the engine's events, then its failure, and releases each request once."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mi_runtime.request import FinishReason, TokenEvent
from server.engine.generation import Generation
from server.wire.errors import DeadlineExceeded

LATE = DeadlineExceeded("late")


class ReleasedRequests:
    """Records what the engine client receives: request id, whether the engine works on it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def __call__(self, request_id: str, engine_works_on_it: bool) -> None:
        self.calls.append((request_id, engine_works_on_it))


def run_scenario(
    scenario: Callable[[Generation, ReleasedRequests], Coroutine[Any, Any, None]],
) -> None:
    async def scenario_with_a_generation() -> None:
        released = ReleasedRequests()
        await scenario(Generation(["a", "b"], released), released)

    asyncio.run(asyncio.wait_for(scenario_with_a_generation(), 20))


def token(request_id: str, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(request_id, 1, finish)


def test_a_failure_releases_open_requests_at_once() -> None:
    async def scenario(generation: Generation, released: ReleasedRequests) -> None:
        generation.push(0.0, token("a", FinishReason.STOP))
        generation.fail(LATE)
        assert released.calls == [("a", False), ("b", True)]

    run_scenario(scenario)


def test_events_before_a_failure_are_taken_first() -> None:
    async def scenario(generation: Generation, _: ReleasedRequests) -> None:
        generation.push(0.0, token("a"))
        generation.fail(LATE)
        with generation:
            assert len(await generation.take()) == 1
            assert generation.is_open
            with pytest.raises(DeadlineExceeded):
                await generation.take()

    run_scenario(scenario)


def test_a_complete_answer_cannot_fail_any_more() -> None:
    async def scenario(generation: Generation, _: ReleasedRequests) -> None:
        for request_id in ("a", "b"):
            generation.push(0.0, token(request_id, FinishReason.STOP))
        generation.fail(LATE)
        assert len(await generation.take()) == 2
        assert not generation.is_open

    run_scenario(scenario)


def test_an_answer_expires_while_it_is_waited_for() -> None:
    async def scenario(generation: Generation, released: ReleasedRequests) -> None:
        generation.fail_after(0.01, LATE)
        with pytest.raises(DeadlineExceeded), generation:
            await generation.take()
        assert sorted(released.calls) == [("a", True), ("b", True)]

    run_scenario(scenario)


def test_the_end_of_an_answer_cancels_its_deadline() -> None:
    async def scenario(generation: Generation, released: ReleasedRequests) -> None:
        generation.fail_after(60, LATE)
        timer = generation._expiry
        with generation:
            pass
        assert timer is not None
        assert timer.cancelled()
        assert len(released.calls) == 2

    run_scenario(scenario)
