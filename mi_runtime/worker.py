"""The engine process: commands from the pipe, an engine step, one report to the pipe.

Started as `python -m mi_runtime.worker --fd N`, where N is its end of a socket pair. The first
message is the EngineConfig; afterwards Submit and Abort come in, and Ready or LoadFailed, then one
StepReport a step go out. The other end closing is the command to stop: when either process dies,
the other sees the end of the pipe at once; one that still loads, which reads nothing, is ended.
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
LEAVE_SECONDS = 2.0  # that this process may take to end by itself behind its pipe


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other process decides
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="this process's end of the pipe")
    connection = Connection(parser.parse_args().fd)
    threading.Thread(target=leave_behind, args=(connection.fileno(),), daemon=True).start()
    try:
        return run(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # tidying up after a GPU that has failed may hang, and the pipe with it


def leave_behind(pipe: int) -> None:
    """Waits for the pipe's other end to close, and ends this process if nothing else does: loading
    may take minutes, in which nobody reads, and would hold a GPU for a server that is gone."""
    hung_up = select.poll()
    hung_up.register(pipe, 0)  # asked for nothing, it tells of this alone
    hung_up.poll()
    time.sleep(LEAVE_SECONDS)
    os._exit(0)


def run(connection: "Connection[object, object]") -> int:
    """Loads the pair, then serves until the pipe ends, which it raises as EOFError."""
    config = connection.recv()
    assert isinstance(config, EngineConfig)
    torch.set_num_threads(config.threads or default_threads())
    try:
        engine = Engine(config)
    except PairError as error:
        connection.send(LoadFailed(str(error)))
        return LOAD_FAILED
    gc.collect()
    gc.freeze()  # what start has left lives on: looking through it would hold up a step
    connection.send(Ready(engine.info))
    while True:
        events = receive(connection, engine)
        events += engine.step()
        connection.send(StepReport(tuple(events), engine.stats()))


def default_threads() -> int:
    """All cores but one, which is left to the HTTP process."""
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return max(1, len(usable) - 1)


def receive(connection: "Connection[object, object]", engine: Engine) -> list[TokenEvent]:
    """Takes every command that has arrived; waits for one when there is nothing to compute."""
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
    try:
        engine.submit(request)
    except RequestRejected as error:
        return TokenEvent(request.request_id, None, FinishReason.ERROR, error=str(error))
    return None


if __name__ == "__main__":
    sys.exit(main())
