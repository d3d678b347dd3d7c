"""The engine process answers over its pipe, and ends with it. `tests/contract` runs its command."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import pytest

import mi_runtime.worker
from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.request import (
    Abort,
    Dial,
    EngineRequest,
    FinishReason,
    LoadFailed,
    Ready,
    RequestRejected,
    SamplingParams,
    StepReport,
    Submit,
    TokenEvent,
)
from tests.forked import FORKSERVER, ForkedProcess
from tests.runtime import oracle

Directories = tuple[Path, Path]
SECONDS = 60  # that a process may take to answer or to end
PROMPT = tuple(range(5, 18))
ENDLESS = 200  # tokens: the request is still running when the test comes to it


def run(main: Callable[[], int], pipe: "Connection[Any, Any]") -> int:
    """Runs `main` with the arguments of the command."""
    sys.argv = ["worker", "--fd", str(pipe.fileno())]
    return main()


class Worker:
    """A worker process, and the test's end of its pipe."""

    def __init__(self, config: EngineConfig, errors: Path, main: Callable[[], int]) -> None:
        self.pipe, theirs = FORKSERVER.Pipe()
        self._errors = errors
        with theirs:
            self.process = ForkedProcess(run, main, theirs, log=errors)
        self.pipe.send(config)

    def receive(self) -> Any:
        assert self.pipe.poll(SECONDS), "the worker is silent"
        return self.pipe.recv()

    def submit(self, request_id: str, value: float = 0.5, **params: Any) -> None:
        sampling = SamplingParams(**{"temperature": 0, "max_tokens": 6, **params})
        self.pipe.send(Submit(EngineRequest(request_id, PROMPT, Dial(value), sampling)))

    def events_until_end(self, *request_ids: str) -> list[TokenEvent]:
        """Returns all events until each of these requests has ended."""
        events: list[TokenEvent] = []
        waiting = set(request_ids)
        while waiting:
            report = self.receive()
            assert isinstance(report, StepReport)
            events += report.events
            waiting -= {event.request_id for event in report.events if event.finish_reason}
        return events

    def exit_code(self) -> int:
        self.pipe.close()
        return self.wait()

    def wait(self) -> int:
        return self.process.wait(SECONDS)

    @property
    def errors(self) -> str:
        return self._errors.read_text()


@pytest.fixture(scope="module")
def start_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Worker]]:
    """Starts a worker with `start_worker(pair)`, which is killed after the module's tests."""
    workers: list[Worker] = []

    def start(directories: Directories, main: Callable[[], int] = mi_runtime.worker.main) -> Worker:
        instruct, thinking = map(str, directories)
        small: dict[str, Any] = {"device": "cpu", "num_blocks": 64, "block_size": 4, "threads": 1}
        errors = tmp_path_factory.mktemp("worker") / "stderr"
        workers.append(Worker(EngineConfig(instruct, thinking, **small), errors, main))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.wait()
        worker.pipe.close()


@pytest.fixture(scope="module")
def worker(start_worker: Callable[..., Worker], qwen3_pair: Directories) -> Worker:
    """Returns a worker that is ready, which the module's tests share."""
    own_worker = start_worker(qwen3_pair)
    assert isinstance(own_worker.receive(), Ready)
    return own_worker


def tokens(events: list[TokenEvent], request_id: str) -> list[int | None]:
    return [event.token_id for event in events if event.request_id == request_id]


# --- Starting and ending ------------------------------------------------------------------------


def test_a_worker_reports_that_it_is_ready_and_ends_with_its_pipe(
    start_worker: Callable[..., Worker], qwen3_pair: Directories
) -> None:
    own_worker = start_worker(qwen3_pair)
    ready = own_worker.receive()
    assert isinstance(ready, Ready)
    assert (ready.info.model_type, ready.info.num_blocks) == ("qwen3", 64)
    assert own_worker.exit_code() == 0
    assert "Traceback" not in own_worker.errors


def run_with_endless_loading() -> int:
    def load(_config: EngineConfig) -> None:
        print("loading", file=sys.stderr, flush=True)
        time.sleep(600)

    mi_runtime.worker.Engine = load  # type: ignore[assignment,misc]
    return mi_runtime.worker.main()


def test_a_loading_worker_ends_with_its_pipe(
    start_worker: Callable[..., Worker], qwen3_pair: Directories
) -> None:
    own_worker = start_worker(qwen3_pair, run_with_endless_loading)
    deadline = time.monotonic() + SECONDS
    while not own_worker.errors:
        assert time.monotonic() < deadline, "the worker does not load"
        time.sleep(0.01)
    assert own_worker.exit_code() == 0
    assert own_worker.errors == "loading\n"


def test_closing_the_pipe_ends_a_worker_that_is_busy(
    start_worker: Callable[..., Worker], qwen3_pair: Directories
) -> None:
    own_worker = start_worker(qwen3_pair)
    assert isinstance(own_worker.receive(), Ready)
    own_worker.submit("r", max_tokens=ENDLESS)
    assert isinstance(own_worker.receive(), StepReport)
    assert own_worker.exit_code() == 0
    assert "Traceback" not in own_worker.errors


def test_the_pipe_of_a_killed_worker_ends(
    start_worker: Callable[..., Worker], qwen3_pair: Directories
) -> None:
    own_worker = start_worker(qwen3_pair)
    assert isinstance(own_worker.receive(), Ready)
    own_worker.submit("r", max_tokens=ENDLESS)
    own_worker.process.kill()
    with pytest.raises((EOFError, ConnectionResetError)):
        own_worker.events_until_end("r")
    assert own_worker.wait() < 0


def run_with_a_broken_engine() -> int:
    def step(_engine: Engine) -> NoReturn:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    Engine.step = step  # type: ignore[method-assign]
    try:
        return mi_runtime.worker.main()
    finally:
        time.sleep(600)


def test_a_worker_whose_engine_fails_exits_at_once_without_cleaning_up(
    start_worker: Callable[..., Worker], qwen3_pair: Directories
) -> None:
    """After a fatal CUDA error, every call that frees GPU memory hangs."""
    own_worker = start_worker(qwen3_pair, run_with_a_broken_engine)
    assert isinstance(own_worker.receive(), Ready)
    own_worker.submit("r")
    assert own_worker.wait() == 1
    assert "an illegal memory access was encountered" in own_worker.errors
    with pytest.raises((EOFError, ConnectionResetError)):
        own_worker.receive()


def test_a_pair_that_cannot_be_served_is_reported_and_the_exit_code_is_2(
    start_worker: Callable[..., Worker], qwen3_pair: Directories, tmp_path: Path
) -> None:
    own_worker = start_worker((qwen3_pair[0], tmp_path / "nothing"))
    report = own_worker.receive()
    assert isinstance(report, LoadFailed)
    assert "nothing: no such directory" in report.message
    assert own_worker.wait() == 2
    assert "Traceback" not in own_worker.errors


def test_a_worker_ignores_sigint(worker: Worker) -> None:
    """Ctrl-C interrupts both processes, and the engine must still answer what drains."""
    worker.submit("r", max_tokens=ENDLESS)
    worker.process.send_signal(signal.SIGINT)
    assert len(worker.events_until_end("r")) == ENDLESS


# --- Requests -----------------------------------------------------------------------------------


def test_requests_are_answered_step_by_step(worker: Worker, qwen3_pair: Directories) -> None:
    values = {"a": 0.0, "b": 0.3, "c": 1.0}
    for request_id, value in values.items():
        worker.submit(request_id, value)
    events = worker.events_until_end(*values)
    for request_id, value in values.items():
        expected = oracle.greedy(oracle.merged(*qwen3_pair, value), list(PROMPT), 6)
        assert tokens(events, request_id) == expected


def test_an_abort_is_answered_with_the_terminal_event(worker: Worker) -> None:
    worker.submit("gone", max_tokens=ENDLESS)
    worker.submit("stays", 0.2)
    worker.receive()
    worker.pipe.send(Abort("gone"))
    events = worker.events_until_end("gone", "stays")
    ends = {event.request_id: event.finish_reason for event in events if event.finish_reason}
    assert ends == {"gone": FinishReason.ABORT, "stays": FinishReason.LENGTH}


def test_aborting_the_only_request_is_reported_at_once(worker: Worker) -> None:
    worker.submit("alone", max_tokens=ENDLESS)
    worker.pipe.send(Abort("alone"))
    assert worker.events_until_end("alone")[-1].finish_reason is FinishReason.ABORT


def test_a_rejected_request_ends_with_an_error_and_the_worker_goes_on(worker: Worker) -> None:
    worker.submit("bad", max_tokens=-1)
    worker.submit("good")
    events = worker.events_until_end("bad", "good")
    (error,) = [event for event in events if event.request_id == "bad"]
    assert (error.token_id, error.finish_reason) == (None, FinishReason.ERROR)
    assert isinstance(error.error, RequestRejected)
    assert str(error.error) == "max_tokens must not be negative: -1"
    assert (error.error.param, error.error.code) == ("max_tokens", None)
    assert len(tokens(events, "good")) == 6


def test_a_rejection_carries_its_code(worker: Worker) -> None:
    worker.pipe.send(Submit(EngineRequest("long", PROMPT * 100, Dial(0.5))))
    (end,) = worker.events_until_end("long")
    assert isinstance(end.error, RequestRejected)
    assert (end.error.param, end.error.code) == ("prompt", "context_length_exceeded")


def test_the_abort_of_an_unknown_request_is_not_answered(worker: Worker) -> None:
    worker.pipe.send(Abort("unknown"))
    assert not worker.pipe.poll(0.2)


def test_every_report_has_the_stats_after_its_step(worker: Worker) -> None:
    worker.submit("r", 0.4, max_tokens=3)
    reports = [worker.receive() for _ in range(3)]
    assert [report.stats.running for report in reports] == [1, 1, 0]
    assert reports[0].stats.running_lambdas == (0.4,)
    assert reports[-1].stats.used_blocks == 0
    steps = [report.stats.steps for report in reports]
    assert steps == list(range(steps[0], steps[0] + 3))
