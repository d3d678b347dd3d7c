"""The pipe's server end, against a real process."""

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


class Bench:
    """A client on a fake engine, and requests for it."""

    def __init__(self, directory: Path, vocabulary: Vocabulary, **limits: Any) -> None:
        config = EngineConfig(instruct=str(directory), thinking=str(directory), max_num_seqs=2)
        command = [sys.executable, str(FAKE_WORKER)]
        self.client = EngineClient(config, command=command, stop_grace=0.3, **limits)
        self.vocabulary = vocabulary
        self.count = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Bench"]:
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


Scenario = Callable[[Bench], Awaitable[None]]


@pytest.fixture
def play(instruct_directory: Path, vocabulary: Vocabulary) -> Callable[..., None]:
    """Run a scenario on a fresh engine."""

    def run(scenario: Scenario, max_waiting: int = 8, **limits: Any) -> None:
        async def scenario_and_stop() -> None:
            limits["max_waiting"] = max_waiting
            async with Bench(instruct_directory, vocabulary, **limits).running() as bench:
                await asyncio.wait_for(scenario(bench), 20)

        asyncio.run(scenario_and_stop())

    return run


async def take_all(generation: Generation) -> list[TokenEvent]:
    events = []
    with generation:
        while generation.is_open:
            events += [event for _, event in await generation.take()]
    return events


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_a_request_gets_its_tokens_and_one_end(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        *tokens, last = await take_all(bench.submit("say 42"))
        assert [it.token_id for it in tokens] == bench.vocabulary.encode("42")
        assert last.finish_reason is FinishReason.STOP
        assert bench.client.open_requests == 0

    play(scenario)


def test_the_requests_of_one_answer_share_a_queue(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        events = await take_all(bench.submit("say 1", "say 22"))
        ended = [event.request_id for event in events if event.finish_reason]
        assert sorted(ended) == ["r1", "r2"]

    play(scenario)


def test_a_request_that_the_engine_rejects_ends_with_an_error(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        request = bench.request("say 1")
        rejections = {
            "context": replace(request, prompt=request.prompt * 1000),
            "outside the vocabulary": replace(request, prompt=(10**6,)),
            "empty": replace(request, prompt=()),
            "vocabulary for grammars": replace(request, grammar="start: /a/"),
        }
        for reason, rejected in rejections.items():
            (end,) = await take_all(bench.client.submit([rejected]))
            assert (end.token_id, end.finish_reason) == (None, FinishReason.ERROR)
            assert isinstance(end.error, RequestRejected)
            assert reason in str(end.error)
        assert await take_all(bench.submit("say 1"))

    play(scenario)


def test_a_prompt_that_was_computed_before_is_found_again(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        command = "say " + "1" * 16
        first = await take_all(bench.submit(command))
        again = await take_all(bench.submit(command))
        assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 16)

    play(scenario)


def test_leaving_early_aborts_in_the_engine(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.submit("forever", "wait") as generation:
            await generation.take()
            await until(lambda: bench.client.stats.running + bench.client.stats.waiting == 2)
        assert bench.client.open_requests == 0
        await until(lambda: bench.client.stats.running + bench.client.stats.waiting == 0)

    play(scenario)


def test_one_of_several_can_be_aborted(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.submit("forever", "forever") as generation:
            await until(lambda: bench.client.stats.running == 2)
            generation.abort("r1")
            await until(lambda: bench.client.stats.running == 1)
            events = await generation.take()
            assert {event.request_id for _, event in events} == {"r2"}

    play(scenario)


def test_a_client_that_left_ends_the_wait(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.submit("wait") as generation:
            asyncio.get_running_loop().call_soon(generation.fail, ClientLeft())
            with pytest.raises(ClientLeft):
                await generation.take()
        await until(lambda: bench.client.stats.waiting == 0)

    play(scenario)


def test_a_wake_gives_an_empty_hand(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.submit("wait") as generation:
            asyncio.get_running_loop().call_soon(generation.wake)
            assert await generation.take() == []

    play(scenario)


def test_an_engine_that_dies_fails_every_open_answer_after_its_tokens(
    play: Callable[..., None],
) -> None:
    async def scenario(bench: Bench) -> None:
        waiting = bench.submit("wait")
        seen = 0
        with pytest.raises(EngineDead), bench.submit("die") as generation:  # noqa: PT012
            while True:
                seen += len(await generation.take())
        assert seen == 3
        with pytest.raises(EngineDead), waiting:
            await waiting.take()
        with pytest.raises(EngineDead):
            bench.submit("say x")

    play(scenario)


def test_an_engine_killed_from_outside_is_noticed(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        os.kill(bench.client.pid, 9)
        await until(lambda: bench.client.ended is not None)
        assert "exit code -9" in str(bench.client.ended)

    play(scenario)


def test_an_engine_that_hangs_is_killed_at_the_end(
    play: Callable[..., None],
) -> None:
    pids: list[int] = []

    async def scenario(bench: Bench) -> None:
        pids.append(bench.client.pid)
        with bench.submit("wedge") as generation:
            await generation.take()

    play(scenario)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_an_engine_that_falls_silent_is_noticed_and_killed(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        with pytest.raises(EngineDead, match="hangs"), bench.submit("wedge") as generation:  # noqa: PT012
            while True:
                await generation.take()
        assert bench.client.ended is not None
        assert bench.client.ended.exit_code == 1
        with pytest.raises(EngineDead):
            bench.submit("say x")
        await asyncio.to_thread(bench.client._process.wait)

    play(scenario, timeout=0.8)


def test_an_engine_that_hangs_is_noticed_though_its_client_left(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        seen = 0
        with bench.submit("wedge") as generation:
            while seen < 3:
                seen += len(await generation.take())
        assert bench.client.open_requests == 0
        await until(lambda: bench.client.ended is not None)

    play(scenario, timeout=0.8)


def test_an_engine_that_does_not_read_holds_up_nobody(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        bench.submit("wedge")
        long = bench.submit("say " + "a" * 500_000)  # more than the pipe takes
        with pytest.raises(EngineDead), long:
            await long.take()

    play(scenario, timeout=0.5)


def test_an_engine_without_work_may_be_silent(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        assert await take_all(bench.submit("say 1"))
        await until(lambda: bench.client._check_timer is None)  # it looked, and nothing was owed
        assert bench.client.ended is None
        assert await take_all(bench.submit("say 1"))

    play(scenario, timeout=1.0)


def test_prompt_tokens_that_wait_are_bounded(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.submit("wait"):  # a single prompt is never too long to wait
            with pytest.raises(Overloaded, match="prompt tokens") as caught:
                bench.submit("say 1")
            assert caught.value.retry_after == 1
        with bench.submit("forever") as generation:
            await generation.take()
            assert await take_all(bench.submit("say 1"))

    play(scenario, max_waiting_tokens=1)


def test_a_full_queue_is_overloaded_and_an_empty_one_is_not(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.submit("forever", "forever"), bench.submit("say 1"):
            await until(lambda: bench.client.stats.waiting == 1)
            with pytest.raises(Overloaded):
                bench.client.check_room()
            with pytest.raises(Overloaded):
                bench.submit("say 2")
        assert await take_all(bench.submit("say 3"))

    play(scenario, max_waiting=1)


def test_a_burst_is_bounded_before_the_engine_has_reported_anything(
    play: Callable[..., None],
) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.submit("forever"), bench.submit("forever"), bench.submit("forever"):
            with pytest.raises(Overloaded):
                bench.submit("forever")
            with pytest.raises(InvalidRequest):
                bench.submit(*["forever"] * 4)

    play(scenario, max_waiting=1)


def test_at_the_end_of_the_drain_time_open_answers_fail(play: Callable[..., None]) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.submit("wait") as generation:
            bench.client.end_open_requests()
            with pytest.raises(Draining):
                await generation.take()

    play(scenario)
