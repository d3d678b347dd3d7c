"""The HTTP process's end of the pipe: starts the engine, sends commands, distributes events.

    event loop ── commands ──▶ queue ──▶ writer thread ──▶ pipe ──▶ engine process
    event loop ◀── one call a message ── reader thread ◀── pipe ◀──┘

There are two threads, so that neither a full pipe nor the unpickling of a message blocks the loop.
If the engine process dies, the pipe ends: every open answer gets an error, and `ended` has the
reason. An engine process that is alive but reports nothing although it has work is killed.
"""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Final, TypeVar

from mi_runtime.config import EngineConfig, GrammarVocabulary, TokenMarks
from mi_runtime.request import (
    Abort,
    Command,
    EngineInfo,
    EngineRequest,
    EngineStats,
    LoadFailed,
    Ready,
    Report,
    StepReport,
    Submit,
    TokenEvent,
)
from server.engine.generation import Generation
from server.engine.retry_after import RetryAfter
from server.engine.watchdog import CHECKS, Traffic, Watchdog
from server.exit_codes import ExitCode
from server.wire.errors import Draining, EngineDead, InvalidRequest, Overloaded

_T = TypeVar("_T")

WORKER_COMMAND: Final = (sys.executable, "-m", "mi_runtime.worker")


class EngineEnded(Exception):
    """Why the engine process has ended, and the exit code that the server ends with."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineClient:
    """One engine process: `start` it, `attach` it to the running event loop, later `stop` it."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_waiting: int,
        max_waiting_tokens: int | None = None,
        timeout: float = 300.0,
        command: Sequence[str] = WORKER_COMMAND,
        stop_grace: float = 5.0,
    ) -> None:
        self._config = config
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens  # of prompts; None: no limit
        self._timeout = timeout  # seconds without a report from an engine that has work
        self._command = command
        self._stop_grace = stop_grace  # seconds between closing the pipe and killing the process
        self._open: dict[str, Generation] = {}
        self._unstarted: dict[str, int] = {}  # prompt tokens of open requests without an event
        self._owed: set[str] = set()  # requests whose end was not reported, aborted or not
        self._retry_after = RetryAfter()
        self._received = self._queued = self._sent = 0  # messages
        self._watchdog = Watchdog(self._traffic)
        self._check_timer: asyncio.TimerHandle | None = None  # while the engine has work
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._process: subprocess.Popen[bytes]  # from `start` on
        self._pipe: Connection  # from `start` on
        self._loop: asyncio.AbstractEventLoop  # from `attach` on
        self.info: EngineInfo | None = None  # None: still loading
        self.stats = EngineStats()
        self.ended: EngineEnded | None = None
        self.settled = asyncio.Event()  # loaded, or ended

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the engine process, which loads while the rest of the server starts."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # Spinning OpenMP threads would occupy the cores that HTTP needs.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                process_group=0,  # Ctrl-C is for the server, which drains first
            )
        self._pipe = Connection(ours.detach())

    def add_vocabulary(
        self, marks: TokenMarks, for_grammars: GrammarVocabulary | None = None
    ) -> None:
        """Adds what the engine needs of the vocabulary to the settings that `attach` sends."""
        assert not self._threads
        self._config = replace(self._config, marks=marks, grammar_vocabulary=for_grammars)

    def attach(self) -> None:
        """Begins to exchange messages. Call it in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._threads = [
            threading.Thread(target=self._write, name="engine-writer", daemon=True),
            threading.Thread(target=self._read, name="engine-reader", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    async def stop(self) -> None:
        """Closes the pipe, waits for the engine process, and kills it if it does not exit."""
        self._stopping = True
        if self._check_timer is not None:
            self._check_timer.cancel()
        self._commands.put(None)
        if self.info is None:
            self._process.terminate()  # it does not read its pipe while it loads
        await asyncio.to_thread(self._reap)

    def discard(self) -> None:
        """Ends a process that was started but never attached."""
        self._process.terminate()
        self._reap()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @property
    def waiting(self) -> int:
        """Requests that wait, by the last report. That may be old if no request is open."""
        return min(self.stats.waiting, len(self._open))

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use, by the last report; 0 if nothing is open."""
        stats = self.stats
        return stats.used_blocks / stats.total_blocks if self._open and stats.total_blocks else 0.0

    # --- requests --------------------------------------------------------------------------------

    def submit(self, requests: Sequence[EngineRequest]) -> Generation:
        """Sends the requests of one answer to the engine. Raises what `check_room` raises."""
        self.check_room(len(requests), sum(len(it.prompt) for it in requests))
        generation = Generation([it.request_id for it in requests], self._release)
        for request in requests:
            self._open[request.request_id] = generation
            self._unstarted[request.request_id] = len(request.prompt)
            self._owed.add(request.request_id)
            self._commands.put(Submit(request))
        self._queued += len(requests)
        if self._check_timer is None:
            self._watchdog = Watchdog(self._traffic)
            self._check_later()
        return generation

    def end_open_requests(self) -> None:
        """Ends every open answer with an error, because the drain time is over."""
        for generation in set(self._open.values()):
            generation.fail(Draining("The server shut down before the answer was complete"))

    def check_room(self, count: int = 1, prompt_tokens: int = 1) -> None:
        """Raises `Overloaded` if the queue has no room for that many requests and tokens.

        Raises `EngineDead` if the engine process has ended, `InvalidRequest` if that many requests
        would never fit.
        """
        if self.ended is not None:
            raise EngineDead("The engine process has ended")
        capacity = self._config.max_num_seqs + self._max_waiting
        if count > capacity:
            raise InvalidRequest(
                f"This server accepts at most {capacity} choices per request", param="n"
            )
        waiting = self.waiting
        queue_is_full = waiting > 0 and waiting + count > self._max_waiting
        if queue_is_full or len(self._open) + count > capacity:
            raise self._overloaded(
                f"{waiting} requests are waiting and {len(self._open)} are open; "
                f"the server's limit is {self._max_waiting} waiting"
            )
        tokens, limit = sum(self._unstarted.values()), self._max_waiting_tokens
        if limit is not None and tokens and tokens + prompt_tokens > limit:
            raise self._overloaded(
                f"{tokens} prompt tokens are waiting; the server's limit is {limit}"
            )

    def _overloaded(self, message: str) -> Overloaded:
        """Returns an error that suggests a retry after the requests before this one have ended."""
        requests_before = max(1, len(self._unstarted))
        seconds = self._retry_after.estimate(requests_before, time.perf_counter())
        return Overloaded(message, retry_after=seconds)

    def _release(self, request_id: str, engine_works_on_it: bool) -> None:
        self._open.pop(request_id, None)
        self._unstarted.pop(request_id, None)
        if engine_works_on_it and self.ended is None:
            self._commands.put(Abort(request_id))
            self._queued += 1

    # --- messages, on the event loop -------------------------------------------------------------

    def _receive(self, report: Report) -> None:
        self._received += 1
        match report:
            case StepReport(events, stats):
                self.stats = stats
                now = time.perf_counter()
                for event in events:
                    self._note(now, event)
                    generation = self._open.get(event.request_id)
                    if generation is not None:
                        generation.push(now, event)
            case Ready(info):
                self.info = info
                self.settled.set()
            case LoadFailed(message):
                self._end(EngineEnded(message, exit_code=ExitCode.UNUSABLE))

    def _note(self, now: float, event: TokenEvent) -> None:
        self._unstarted.pop(event.request_id, None)
        if event.finish_reason is not None:
            self._owed.discard(event.request_id)
            self._retry_after.note_end(now)

    def _end(self, reason: EngineEnded) -> None:
        """Ends all open answers. Only the first reason counts: a failed load also ends the pipe."""
        if self.ended is not None:
            return
        self.ended = reason
        self.settled.set()
        for generation in set(self._open.values()):
            generation.fail(EngineDead(str(reason)))

    # --- an engine that hangs --------------------------------------------------------------------

    @property
    def _traffic(self) -> Traffic:
        return Traffic(self._received, self._queued, self._sent)

    def _check_later(self) -> None:
        self._check_timer = self._loop.call_later(self._timeout / CHECKS, self._check)

    def _check(self) -> None:
        self._check_timer = None
        if not self._owed or self.ended is not None:
            return
        if self._watchdog.check(self._traffic):
            self._end(
                EngineEnded(
                    f"The engine process hung: {len(self._owed)} requests are unfinished and "
                    f"nothing was reported for {self._timeout:g} s (--engine-timeout)",
                    exit_code=ExitCode.FAILED,
                )
            )
            self._process.kill()
        else:
            self._check_later()

    # --- threads ---------------------------------------------------------------------------------

    def _write(self) -> None:
        with suppress(OSError):  # the reader also sees the end of the pipe, and reports it
            self._pipe.send(self._config)
            while (command := self._commands.get()) is not None:
                self._pipe.send(command)
                self._sent += 1
        self._shut()

    def _shut(self) -> None:
        """Shuts the pipe down. Unlike a close, this also wakes a thread that waits on it."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._hand_over(self._receive, self._pipe.recv())
        self._pipe_ended()

    def _pipe_ended(self) -> None:
        if self._stopping:
            return
        try:
            code = self._process.wait(timeout=self._stop_grace)
            message = f"The engine process ended (exit code {code})"
        except subprocess.TimeoutExpired:
            message = "The engine process closed its pipe but did not exit"
        self._hand_over(self._end, EngineEnded(message, exit_code=ExitCode.FAILED))

    def _hand_over(self, call: Callable[[_T], None], argument: _T) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, argument)

    def _reap(self) -> None:
        if not self._exits():
            self._process.kill()
            self._exits()  # if a driver blocks even that, the server exits without waiting
        self._shut()
        for thread in self._threads:
            thread.join()
        self._pipe.close()

    def _exits(self) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=self._stop_grace)
        return self._process.returncode is not None
