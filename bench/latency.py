"""Measures the delay that the server adds to a token, and the time of a refused request.

    python -m bench.latency [--rounds N]

- A token: the time from the engine writing it to the pipe until this process has read it from its
  socket, with 64 streams at λ = 0, where every token is one event. It includes the pipe, the HTTP
  process, loopback and this client's loop, on the same cores that the engine computes on.
- A refusal: the time from sending a request on an open connection to having read the answer, on an
  idle server and with 64 streams running.
"""

import argparse
import asyncio
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import quantiles
from typing import Any

from bench.live_server.server_process import Server, refused_seconds
from bench.live_server.streams import STREAMS, stream_requests
from bench.measuring.publishing import publish

REFUSED: dict[str, tuple[int, dict[str, str], Any]] = {
    "wrong key": (401, {"Authorization": "Bearer wrong"}, {}),
    "unknown field": (400, {}, {"model": "mi-embedded", "messages": [], "lambda": 1}),
    "unknown model": (404, {}, {"model": "x", "messages": [{"role": "user", "content": "x"}]}),
    "body too long": (413, {}, {"model": "x" * 20_000}),
}  # by reason: status, headers, body
KEY = "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    publish("latency-token", "ms", added_to_a_token(rounds), {})
    publish("latency-refusal", "ms", of_refusals(), {})


def added_to_a_token(rounds: int) -> dict[str, list[float]]:
    """Returns the milliseconds added to a token: quantiles over the tokens of each round."""
    measured: dict[str, list[float]] = {"p50": [], "p90": [], "p99": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            stamps = Path(directory) / "stamps"
            with Server(stamps=stamps) as server:
                asyncio.run(server.stream_all(stream_requests(0, lambdas=[0.0] * STREAMS)))  # warm
                requests = stream_requests(number + 1, lambdas=[0.0] * STREAMS)
                streamed = asyncio.run(server.stream_all(requests))
            arrivals = {one.request.seed: one.moments for one in streamed}
            cuts = quantiles(seconds_added(stamps, arrivals), n=100)
        for name, row in measured.items():
            row.append(cuts[int(name[1:]) - 1] * 1000)
        print(f"round {number + 1}/{rounds}  p99 {cuts[98] * 1000:.2f} ms", flush=True)
    return measured


def seconds_added(stamps: Path, arrivals: dict[int, list[float]]) -> list[float]:
    """Returns the seconds from the engine to the client for every token.

    Streams in which a token did not come as one event are left out.
    """
    handed: dict[int, list[float]] = defaultdict(list)
    for line in stamps.read_text().splitlines():
        seed, _, seconds = line.split()
        handed[int(seed)].append(float(seconds))
    matching = [seed for seed, moments in arrivals.items() if len(moments) == len(handed[seed])]
    assert len(matching) >= 0.9 * len(arrivals), "too many tokens were not one event each"
    return [
        there - here
        for seed in matching
        for here, there in zip(handed[seed], arrivals[seed], strict=True)
    ]


def of_refusals() -> dict[str, list[float]]:
    """Returns the milliseconds of every refused request, for each reason, idle and under load."""
    flags = ("--api-key", KEY, "--max-body-bytes", "10000")
    with Server(*flags) as server:
        rows = {f"{why}, idle": milliseconds(server, why) for why in REFUSED}

        async def under_load() -> None:
            requests = stream_requests(1, lambdas=[0.0] * STREAMS)
            streams = asyncio.create_task(server.stream_all(requests, key=KEY))
            for why in REFUSED:
                rows[f"{why}, {STREAMS} streams"] = await asyncio.to_thread(
                    milliseconds, server, why
                )
            await streams

        asyncio.run(under_load())
    return rows


def milliseconds(server: Server, why: str) -> list[float]:
    status, headers, body = REFUSED[why]
    given = {"Authorization": f"Bearer {KEY}"} | headers
    return [seconds * 1000 for seconds in refused_seconds(server, given, body, status)]


if __name__ == "__main__":
    main()
