"""The engine process: reads commands from the pipe, runs a step, writes a report to the pipe.

It is started as `python -m mi_runtime.worker --fd N`, where N is its end of a socket pair. It first
reads the EngineConfig, then Submit and Abort commands. It writes Ready or LoadFailed, then one
StepReport for each step. Closing the other end is the command to stop: when either process dies,
the other sees the end of the pipe at once. A process that is still loading does not read the pipe,
so a thread watches the pipe and ends the process.
"""

import argparse
import gc
import os
import select
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

import torch

from mi_runtime.config import EngineConfig
from mi_runtime.engine import Engine
from mi_runtime.errors import PairError
from mi_runtime.request import (
    Abort,
    Command,
    EngineRequest,
    FinishReason,
    LoadFailed,
    Ready,
    RequestRejected,
    StepReport,
    Submit,
    TokenEvent,
)

LOAD_FAILED = 2  # exit code
EXIT_SECONDS = 2.0  # for this process to exit on its own after the pipe closes


def main() -> int:
    # Ctrl-C reaches both processes; the HTTP process handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="this process's end of the pipe")
    connection = Connection(parser.parse_args().fd)
    threading.Thread(target=exit_after_pipe, args=(connection.fileno(),), daemon=True).start()
    try:
        return run(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # cleaning up after a failed GPU may hang, and the pipe would stay open


def exit_after_pipe(pipe: int) -> None:
    """Waits until the other end of the pipe is closed, then ends this process if nothing else does.

    Loading may take minutes without reading the pipe, and would occupy a GPU for a dead server.
    """
    hung_up = select.poll()
    hung_up.register(pipe, 0)  # with no events requested, poll reports only that the pipe hung up
    hung_up.poll()
    time.sleep(EXIT_SECONDS)
    os._exit(0)


def run(connection: "Connection[object, object]") -> int:
    """Loads the pair, then serves until the pipe ends, which raises EOFError.

    Returns the exit code if loading failed.
    """
    config = connection.recv()
    assert isinstance(config, EngineConfig)
    torch.set_num_threads(config.threads or default_threads())
    try:
        engine = Engine(config)
    except PairError as error:
        connection.send(LoadFailed(str(error)))
        return LOAD_FAILED
    gc.collect()
    gc.freeze()  # what loading created stays alive: collecting it would delay a step
    connection.send(Ready(engine.info))
    while True:
        events = receive(connection, engine)
        events += engine.step()
        connection.send(StepReport(tuple(events), engine.stats()))


def default_threads() -> int:
    """Returns the number of cores but one, which is left to the HTTP process."""
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return max(1, len(usable) - 1)


def receive(connection: "Connection[object, object]", engine: Engine) -> list[TokenEvent]:
    """Applies every command that has arrived; waits for one if there is nothing to compute."""
    events: list[TokenEvent] = []
    while connection.poll(None if engine.idle and not events else 0):
        command = connection.recv()
        assert isinstance(command, Command)
        event = apply(command, engine)
        if event is not None:
            events.append(event)
    return events


def apply(command: Command, engine: Engine) -> TokenEvent | None:
    match command:
        case Submit(request):
            return submit(request, engine)
        case Abort(request_id):
            return engine.abort(request_id)


def submit(request: EngineRequest, engine: Engine) -> TokenEvent | None:
    """Returns the terminal event of a request that the engine rejects."""
    try:
        engine.submit(request)
    except RequestRejected as error:
        return TokenEvent(request.request_id, None, FinishReason.ERROR, error=error)
    return None


if __name__ == "__main__":
    sys.exit(main())
