"""The engine process, which also records when it wrote each token to the pipe.

    python bench/live_server/stamped_worker.py --stamps FILE --fd N

FILE gets one line for each token, `seed index seconds`: the request's seed, by which the bench
identifies it; the token's position in the answer; and the monotonic clock, which all processes of a
machine share.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from mi_runtime.request import StepReport, Submit
from mi_runtime.worker import run


class StampedPipe:
    """A pipe that records when each token was written to it."""

    def __init__(self, pipe: "Connection[object, object]") -> None:
        self._pipe = pipe
        self._seeds: dict[str, int | None] = {}
        self._sent: list[tuple[float, list[str]]] = []

    def poll(self, timeout: float | None) -> bool:
        return self._pipe.poll(timeout)

    def recv(self) -> object:
        message = self._pipe.recv()
        if isinstance(message, Submit):
            self._seeds[message.request.request_id] = message.request.sampling.seed
        return message

    def send(self, message: object) -> None:
        if isinstance(message, StepReport):
            ids = [event.request_id for event in message.events if event.token_id is not None]
            self._sent.append((time.monotonic(), ids))
        self._pipe.send(message)

    def stamps(self) -> Iterator[str]:
        count: Counter[str] = Counter()
        for seconds, ids in self._sent:
            for request_id in ids:
                yield f"{self._seeds[request_id]} {count[request_id]} {seconds:.6f}"
                count[request_id] += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stamps", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    pipe: Any = StampedPipe(Connection(arguments.fd))
    try:
        run(pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        arguments.stamps.write_text("\n".join(pipe.stamps()) + "\n")


if __name__ == "__main__":
    main()
