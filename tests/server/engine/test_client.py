"""The engine client submits, aborts and ends requests, and notices a hanging or dead engine."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mi_runtime.config import EngineConfig
from mi_runtime.request import (
    Dial,
    EngineRequest,
    FinishReason,
    RequestRejected,
    SamplingParams,
    TokenEvent,
)
from server.engine.client import EngineClient
from server.engine.generation import ClientLeft, Generation
from server.text.vocabulary import Vocabulary
from server.wire.errors import Draining, EngineDead, InvalidRequest, Overloaded

FAKE_WORKER = Path(__file__).parents[1] / "fake_worker.py"


class FakeEngineClient:
    """Runs an engine client on the fake worker, and makes requests for it."""

    def __init__(self, directory: Path, vocabulary: Vocabulary, **limits: Any) -> None:
        config = EngineConfig(instruct=str(directory), thinking=str(directory), max_num_seqs=2)
        command = [sys.executable, str(FAKE_WORKER)]
        self.client = EngineClient(config, command=command, stop_grace=0.3, **limits)
        self.vocabulary = vocabulary
        self.count = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FakeEngineClient"]:
        self.client.start()
        self.client.attach()
        try:
            await asyncio.wait_for(self.client.settled.wait(), 20)
            yield self
        finally:
            await self.client.stop()

    def request(self, command: str, max_tokens: int = 10**9) -> EngineRequest:
        self.count += 1
        text = f"<|im_start|>user\n{command}<|im_end|>\n<|im_start|>assistant\n"
        sampling = SamplingParams(
            max_tokens=max_tokens,
            eos_token_ids=frozenset(self.vocabulary.encode("<|im_end|>")),
        )
        prompt = tuple(self.vocabulary.encode(text))
        return EngineRequest(f"r{self.count}", prompt, Dial(0.5), sampling)

    def submit(self, *commands: str) -> Generation:
        return self.client.submit([self.request(command) for command in commands])


Scenario = Callable[[FakeEngineClient], Awaitable[None]]


@pytest.fixture
def run_scenario(instruct_directory: Path, vocabulary: Vocabulary) -> Callable[..., None]:
    """Returns a function that runs a scenario on a fresh engine."""

    def run(scenario: Scenario, max_waiting: int = 8, **limits: Any) -> None:
        async def scenario_and_stop() -> None:
            limits["max_waiting"] = max_waiting
            async with FakeEngineClient(
                instruct_directory, vocabulary, **limits
            ).running() as engine:
                await asyncio.wait_for(scenario(engine), 20)

        asyncio.run(scenario_and_stop())

    return run


async def take_all(generation: Generation) -> list[TokenEvent]:
    events = []
    with generation:
        while generation.is_open:
            events += [event for _, event in await generation.take()]
    return events


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_a_request_gets_its_tokens_and_one_end(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        *tokens, last = await take_all(engine.submit("say 42"))
        assert [it.token_id for it in tokens] == engine.vocabulary.encode("42")
        assert last.finish_reason is FinishReason.STOP
        assert engine.client.open_requests == 0

    run_scenario(scenario)


def test_each_request_of_one_answer_gets_its_end(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        events = await take_all(engine.submit("say 1", "say 22"))
        ended = [event.request_id for event in events if event.finish_reason]
        assert sorted(ended) == ["r1", "r2"]

    run_scenario(scenario)


def test_a_request_that_the_engine_rejects_ends_with_an_error(
    run_scenario: Callable[..., None],
) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        request = engine.request("say 1")
        rejections = {
            "context": replace(request, prompt=request.prompt * 1000),
            "outside the vocabulary": replace(request, prompt=(10**6,)),
            "empty": replace(request, prompt=()),
            "vocabulary for grammars": replace(request, grammar="start: /a/"),
        }
        for reason, rejected in rejections.items():
            (end,) = await take_all(engine.client.submit([rejected]))
            assert (end.token_id, end.finish_reason) == (None, FinishReason.ERROR)
            assert isinstance(end.error, RequestRejected)
            assert reason in str(end.error)
        assert await take_all(engine.submit("say 1"))

    run_scenario(scenario)


def test_a_prompt_that_was_computed_before_is_found_again(
    run_scenario: Callable[..., None],
) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        command = "say " + "1" * 16
        first = await take_all(engine.submit(command))
        again = await take_all(engine.submit(command))
        assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 16)

    run_scenario(scenario)


def test_a_generation_that_is_left_early_is_aborted_in_the_engine(
    run_scenario: Callable[..., None],
) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        with engine.submit("forever", "wait") as generation:
            await generation.take()
            await wait_until(lambda: engine.client.stats.running + engine.client.stats.waiting == 2)
        assert engine.client.open_requests == 0
        await wait_until(lambda: engine.client.stats.running + engine.client.stats.waiting == 0)

    run_scenario(scenario)


def test_one_of_several_can_be_aborted(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        with engine.submit("forever", "forever") as generation:
            await wait_until(lambda: engine.client.stats.running == 2)
            generation.abort("r1")
            await wait_until(lambda: engine.client.stats.running == 1)
            events = await generation.take()
            assert {event.request_id for _, event in events} == {"r2"}

    run_scenario(scenario)


def test_waiting_for_tokens_ends_when_the_client_leaves(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        with engine.submit("wait") as generation:
            asyncio.get_running_loop().call_soon(generation.fail, ClientLeft())
            with pytest.raises(ClientLeft):
                await generation.take()
        await wait_until(lambda: engine.client.stats.waiting == 0)

    run_scenario(scenario)


def test_a_wake_ends_a_wait_without_events(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        with engine.submit("wait") as generation:
            asyncio.get_running_loop().call_soon(generation.wake)
            assert await generation.take() == []

    run_scenario(scenario)


def test_an_engine_that_dies_fails_every_open_answer_after_its_tokens(
    run_scenario: Callable[..., None],
) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        waiting = engine.submit("wait")
        seen = 0
        with pytest.raises(EngineDead), engine.submit("die") as generation:  # noqa: PT012
            while True:
                seen += len(await generation.take())
        assert seen == 3
        with pytest.raises(EngineDead), waiting:
            await waiting.take()
        with pytest.raises(EngineDead):
            engine.submit("say x")

    run_scenario(scenario)


def test_an_engine_killed_from_outside_is_noticed(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        os.kill(engine.client.pid, 9)
        await wait_until(lambda: engine.client.ended is not None)
        assert "exit code -9" in str(engine.client.ended)

    run_scenario(scenario)


def test_an_engine_that_hangs_is_killed_when_the_client_stops(
    run_scenario: Callable[..., None],
) -> None:
    pids: list[int] = []

    async def scenario(engine: FakeEngineClient) -> None:
        pids.append(engine.client.pid)
        with engine.submit("wedge") as generation:
            await generation.take()

    run_scenario(scenario)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_an_engine_that_hangs_is_noticed_and_killed(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        with pytest.raises(EngineDead, match="hung"), engine.submit("wedge") as generation:  # noqa: PT012
            while True:
                await generation.take()
        assert engine.client.ended is not None
        assert engine.client.ended.exit_code == 1
        with pytest.raises(EngineDead):
            engine.submit("say x")
        await asyncio.to_thread(engine.client._process.wait)

    run_scenario(scenario, timeout=0.8)


def test_an_engine_that_hangs_is_noticed_even_after_its_client_left(
    run_scenario: Callable[..., None],
) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        seen = 0
        with engine.submit("wedge") as generation:
            while seen < 3:
                seen += len(await generation.take())
        assert engine.client.open_requests == 0
        await wait_until(lambda: engine.client.ended is not None)

    run_scenario(scenario, timeout=0.8)


def test_an_engine_that_reads_no_commands_does_not_block_the_event_loop(
    run_scenario: Callable[..., None],
) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        engine.submit("wedge")
        long = engine.submit("say " + "a" * 500_000)  # more than the pipe takes
        with pytest.raises(EngineDead), long:
            await long.take()

    run_scenario(scenario, timeout=0.5)


def test_an_idle_engine_is_not_taken_for_hanging(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        assert await take_all(engine.submit("say 1"))
        # The timer is gone once a check has found no open request.
        await wait_until(lambda: engine.client._check_timer is None)
        assert engine.client.ended is None
        assert await take_all(engine.submit("say 1"))

    run_scenario(scenario, timeout=1.0)


def test_prompt_tokens_that_wait_are_bounded(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        with engine.submit("wait"):  # a single prompt is never too long to wait
            with pytest.raises(Overloaded, match="prompt tokens") as caught:
                engine.submit("say 1")
            assert caught.value.retry_after == 1
        with engine.submit("forever") as generation:
            await generation.take()
            assert await take_all(engine.submit("say 1"))

    run_scenario(scenario, max_waiting_tokens=1)


def test_a_full_queue_is_overloaded_and_an_empty_one_is_not(
    run_scenario: Callable[..., None],
) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        with engine.submit("forever", "forever"), engine.submit("say 1"):
            await wait_until(lambda: engine.client.stats.waiting == 1)
            with pytest.raises(Overloaded):
                engine.client.check_room()
            with pytest.raises(Overloaded):
                engine.submit("say 2")
        assert await take_all(engine.submit("say 3"))

    run_scenario(scenario, max_waiting=1)


def test_a_burst_is_bounded_before_the_engine_has_reported_anything(
    run_scenario: Callable[..., None],
) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        with engine.submit("forever"), engine.submit("forever"), engine.submit("forever"):
            with pytest.raises(Overloaded):
                engine.submit("forever")
            with pytest.raises(InvalidRequest):
                engine.submit(*["forever"] * 4)

    run_scenario(scenario, max_waiting=1)


def test_answers_still_open_after_the_drain_time_fail(run_scenario: Callable[..., None]) -> None:
    async def scenario(engine: FakeEngineClient) -> None:
        with engine.submit("wait") as generation:
            engine.client.end_open_requests()
            with pytest.raises(Draining):
                await generation.take()

    run_scenario(scenario)
