"""The HTTP process's end of the pipe: starts the engine process, sends commands, hands out events.

    event loop ── commands ──▶ queue ──▶ writer thread ──▶ pipe ──▶ engine process
    event loop ◀── one call a message ── reader thread ◀── pipe ◀──┘

Two threads, so that neither a full pipe nor an unpickled message ever blocks the loop. The engine
process dying is the end of the pipe: every open answer gets an error, and `ended` tells why. One
that lives and says nothing, though it has work, is killed.
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
from server.engine.retry_after import Pace
from server.engine.watchdog import LOOKS, Traffic, Watchdog
from server.exit_codes import ExitCode
from server.wire.errors import Draining, EngineDead, InvalidRequest, Overloaded

_T = TypeVar("_T")

WORKER_COMMAND: Final = (sys.executable, "-m", "mi_runtime.worker")


class EngineEnded(Exception):
    """Why the engine process is gone, and the exit code the server ends with."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineClient:
    """One engine process. `start` it at once, `attach` it to the running loop, `stop` it."""

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
        self._max_waiting_tokens = max_waiting_tokens  # of prompts; None: any number
        self._timeout = timeout  # seconds of silence of an engine that has work
        self._command = command
        self._stop_grace = stop_grace  # seconds between the pipe's end and a kill
        self._open: dict[str, Generation] = {}
        self._unstarted: dict[str, int] = {}  # prompt tokens of open requests without an event
        self._owed: set[str] = set()  # requests whose end the engine has not told, aborted or not
        self._pace = Pace()
        self._received = self._given = self._sent = 0  # messages
        self._watch: asyncio.TimerHandle | None = None  # while the engine owes
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self.info: EngineInfo | None = None  # None: still loading
        self.stats = EngineStats()
        self.ended: EngineEnded | None = None
        self.settled = asyncio.Event()  # loaded, or ended

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine process; it loads while the rest of the server does."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # OpenMP threads that spin would take the cores that HTTP needs.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
                process_group=0,  # a terminal's Ctrl-C is for the server, which drains first
            )
        self._pipe = Connection(ours.detach())

    def tell(self, marks: TokenMarks, for_grammars: GrammarVocabulary | None = None) -> None:
        """Add what the vocabulary says to the settings, which `attach` sends."""
        assert not self._threads
        self._config = replace(self._config, marks=marks, grammar_vocabulary=for_grammars)

    def attach(self) -> None:
        """Begin to talk, from the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._threads = [
            threading.Thread(target=self._write, name="engine-writer", daemon=True),
            threading.Thread(target=self._read, name="engine-reader", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    async def stop(self) -> None:
        """End the pipe, wait for the engine process, and kill it if it does not go by itself."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
        self._commands.put(None)
        if self.info is None:
            self._process.terminate()  # it loads, and does not look at its pipe
        await asyncio.to_thread(self._reap)

    def discard(self) -> None:
        """End a process that was started but never attached."""
        self._process.terminate()
        self._reap()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def open_requests(self) -> int:
        return len(self._open)

    # --- requests --------------------------------------------------------------------------------

    def submit(self, requests: Sequence[EngineRequest]) -> Generation:
        """Hand the requests of one answer to the engine, or raise `Overloaded`."""
        self.check_room(len(requests), sum(len(it.prompt) for it in requests))
        generation = Generation([it.request_id for it in requests], self._release)
        for request in requests:
            self._open[request.request_id] = generation
            self._unstarted[request.request_id] = len(request.prompt)
            self._owed.add(request.request_id)
            self._give(Submit(request))
        if self._watch is None:
            self._watchdog = Watchdog(self._traffic)
            self._look_later()
        return generation

    def end_open_requests(self) -> None:
        """The drain time is over: every open answer ends with an error."""
        for generation in set(self._open.values()):
            generation.fail(Draining("The server shut down before the answer was complete"))

    def check_room(self, count: int = 1, prompt_tokens: int = 1) -> None:
        """Raises `Overloaded` where the queue has no room for so many requests and tokens."""
        if self.ended is not None:
            raise EngineDead("The engine process is gone")
        capacity = self._config.max_num_seqs + self._max_waiting
        if count > capacity:
            raise InvalidRequest(f"This server holds {capacity} choices at once", param="n")
        # What the engine said last, which may be old where it has nothing to do.
        waiting = min(self.stats.waiting, len(self._open))
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
        """Comes with the time that the requests before this one will take."""
        seconds = self._pace.seconds_for(max(1, len(self._unstarted)), time.perf_counter())
        return Overloaded(message, retry_after=seconds)

    def _release(self, request_id: str, engine_works_on_it: bool) -> None:
        self._open.pop(request_id, None)
        self._unstarted.pop(request_id, None)
        if engine_works_on_it and self.ended is None:
            self._give(Abort(request_id))

    def _give(self, command: Command) -> None:
        self._given += 1
        self._commands.put(command)

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
            self._pace.ended(now)

    def _end(self, reason: EngineEnded) -> None:
        """The first reason counts: a failed load is followed by the pipe's end."""
        if self.ended is not None:
            return
        self.ended = reason
        self.settled.set()
        for generation in set(self._open.values()):
            generation.fail(EngineDead(str(reason)))

    # --- an engine that hangs --------------------------------------------------------------------

    @property
    def _traffic(self) -> Traffic:
        return Traffic(self._received, self._given, self._sent)

    def _look_later(self) -> None:
        self._watch = self._loop.call_later(self._timeout / LOOKS, self._look)

    def _look(self) -> None:
        self._watch = None
        if not self._owed or self.ended is not None:
            return
        if self._watchdog.look(self._traffic):
            self._end(
                EngineEnded(
                    f"The engine process hangs: it owes {len(self._owed)} answers and has said "
                    f"nothing for {self._timeout:g} s (--engine-timeout)",
                    exit_code=ExitCode.FAILED,
                )
            )
            self._process.kill()
        else:
            self._look_later()

    # --- threads ---------------------------------------------------------------------------------

    def _write(self) -> None:
        with suppress(OSError):  # the reader sees the pipe's end as well, and tells
            self._pipe.send(self._config)
            while (command := self._commands.get()) is not None:
                self._pipe.send(command)
                self._sent += 1
        self._shut()

    def _shut(self) -> None:
        """Unlike a close, this also ends what waits on the pipe in another thread."""
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
            how = f"exit code {self._process.wait(timeout=self._stop_grace)}"
        except subprocess.TimeoutExpired:
            how = "it still runs, but closed its pipe"
        self._hand_over(
            self._end, EngineEnded(f"The engine process ended ({how})", exit_code=ExitCode.FAILED)
        )

    def _hand_over(self, call: Callable[[_T], None], argument: _T) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(call, argument)

    def _reap(self) -> None:
        if not self._exits():
            self._process.kill()
            self._exits()  # where even that has to wait for a driver, the server goes without it
        self._shut()
        for thread in self._threads:
            thread.join()
        self._pipe.close()

    def _exits(self) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=self._stop_grace)
        return self._process.returncode is not None
