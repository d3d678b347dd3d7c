"""Every accepted request ends exactly once, though clients leave, engines die or servers stop.

Most tests run the real engine, whose KV blocks must all be free in the end, and whose metrics must
add up. `test_process` tests faults that need only a fake engine.
"""

import asyncio
import json
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.contract.conftest import ServerProcess, StartFake, WaitUntil, wait_until

MAX_NUM_SEQS = 4
MAX_WAITING = 4
CAPACITY = MAX_NUM_SEQS + MAX_WAITING
ABORTS = 96
PHASES = ("before the head", "before the first token", "in the middle", "plain")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


SMALL = ("--max-num-seqs", f"{MAX_NUM_SEQS}", "--max-waiting", f"{MAX_WAITING}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Starts a server on the real engine that runs and queues few requests."""
    log = tmp_path_factory.mktemp("faults") / "server.log"
    process = ServerProcess.of_embedded_pair(log, *SMALL)
    try:
        yield process.wait_ready()
    finally:
        process.stop()


def long_answer(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    """Returns a chat request whose answer ends only by its length."""
    long = {"max_tokens": 400, "ignore_eos": True, "temperature": 0, "reasoning_lambda": 0.5}
    return server.chat_body("a=6,b=a-2,c=b+6,d=c-3. d?", **long | fields)


def long_text(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    """Returns the same request to `/v1/completions`."""
    body = long_answer(server, **fields)
    (message,) = body.pop("messages")
    return body | {"prompt": message["content"]}


LONG = {CHAT: long_answer, TEXT: long_text}


def ended_requests(server: ServerProcess) -> Counter[str]:
    """Returns how many requests have ended, by reason."""
    counters = re.findall(
        r'mi_request_success_total\{finished_reason="(\w+)".*?\} (\S+)', server.get("/metrics").text
    )
    return Counter({reason: int(float(count)) for reason, count in counters})


def rejections(server: ServerProcess) -> int:
    counters = re.findall(
        r"mi_admission_rejections_total\{.*?\} (\S+)", server.get("/metrics").text
    )
    return int(sum(map(float, counters)))


def assert_still_right(server: ServerProcess) -> None:
    body = server.chat_body("a=6,b=a-2,c=b+6,d=c-3. d?", temperature=0, reasoning_lambda=1)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"] == "Answer: 7"


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def terminal_events(text: str) -> list[Any]:
    """Returns what ended the choices of a stream: finish reasons, or an error's code."""
    events = [event for event in events_of(text) if event != "[DONE]"]
    finishes = [
        choice["finish_reason"]
        for event in events
        for choice in event.get("choices", ())
        if choice["finish_reason"] is not None
    ]
    return finishes + [event["error"]["code"] for event in events if "error" in event]


async def post_all(
    server: ServerProcess, bodies: Sequence[dict[str, Any]], path: str = CHAT
) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        url = server.url + path
        return list(await asyncio.gather(*(client.post(url, json=body) for body in bodies)))


# --- clients that leave --------------------------------------------------------------------------


def connect(server: ServerProcess, small_buffers: bool = False) -> socket.socket:
    address = urlsplit(server.url)
    assert address.hostname is not None
    connection = socket.socket()
    if small_buffers:  # the window and the segments bound the server's buffer as well
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.settimeout(30)
    connection.connect((address.hostname, address.port or 80))
    return connection


def bytes_in_kernel(connection: socket.socket) -> int:
    """Returns how much the kernel holds of what was sent over a connection of this machine."""
    ends = {f"{end[1]:04X}" for end in (connection.getsockname(), connection.getpeername())}
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    queues = [
        queued
        for _, local, remote, _, queued, *_ in lines
        if {local.split(":")[1], remote.split(":")[1]} == ends
    ]
    assert len(queues) == 2
    return sum(int(size, 16) for both in queues for size in both.split(":"))


def raw_request(body: bytes, *headers: str, path: str = CHAT, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = (f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {length}", *headers)
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def leave(server: ServerProcess, path: str, phase: str) -> None:
    """Sends one request whose client disconnects in this phase of its answer."""
    body = json.dumps(LONG[path](server, stream=phase != "plain")).encode()
    with closing(connect(server)) as connection:
        connection.sendall(raw_request(body, path=path))
        if phase == "before the first token":
            connection.recv(16)  # of the head
        elif phase == "in the middle":
            received = b""
            while received.count(b"data: ") < 4:
                received += connection.recv(65536)


def test_clients_that_disconnect_leave_no_request_in_the_engine(
    server: ServerProcess, wait_until: WaitUntil
) -> None:
    before, refused = ended_requests(server), rejections(server)
    ways = cycle(product((CHAT, CHAT, TEXT), PHASES))
    for path, phase in islice(ways, ABORTS):
        leave(server, path, phase)
    # A request was never accepted if its client left before it was read, or if it was refused.
    wait_until(lambda: (ended_requests(server) - before)["abort"] >= ABORTS // 2)
    wait_until(server.is_idle)
    ended = ended_requests(server) - before
    assert set(ended) == {"abort"}
    assert ended["abort"] <= ABORTS - (rejections(server) - refused)
    assert_still_right(server)
    assert "Traceback" not in server.output


def test_a_client_that_stops_reading_blocks_no_other_client_and_loses_no_data(
    server: ServerProcess, wait_until: WaitUntil
) -> None:
    wordy = long_answer(server, n=3, max_tokens=200, logprobs=True, top_logprobs=20)
    body = json.dumps(wordy | {"stream": True}).encode()
    with closing(connect(server, small_buffers=True)) as connection:
        connection.sendall(raw_request(body, "Connection: close"))
        connection.recv(1)
        assert_still_right(server)
        wait_until(server.is_idle)  # the engine is done with it, unread
        in_kernel = bytes_in_kernel(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        received = b"".join(iter(lambda: connection.recv(1 << 20), b"")).decode()
    assert len(received) - in_kernel > 100_000  # the server itself held these
    assert terminal_events(received) == ["length"] * 3
    assert received.count('"top_logprobs":[') == 3 * 200
    assert "data: [DONE]" in received


# --- overload and extreme requests ---------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_at_ten_times_the_capacity_requests_are_answered_or_refused(
    path: str, server: ServerProcess, wait_until: WaitUntil
) -> None:
    before, refused = ended_requests(server), rejections(server)
    bodies = [LONG[path](server, max_tokens=100, stream=index % 2 == 0) for index in range(80)]
    assert len(bodies) == 10 * CAPACITY
    responses = asyncio.run(post_all(server, bodies, path))
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= CAPACITY
    for response in responses:
        if response.status_code == 503:
            assert response.json()["error"]["code"] == "overloaded"
            assert 1 <= int(response.headers["Retry-After"]) <= 120
    wait_until(server.is_idle)
    assert ended_requests(server) - before == Counter(length=statuses[200])
    assert rejections(server) - refused == statuses[503]


BROKEN_BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"model": "\xff"}',
    "not an object": b"[1, 2]",
    "deeply nested": b"[" * 100_000,
    "nested messages": b'{"model": "pair", "messages": ' + b"[" * 50_000,
    "not a number": b'{"model": "pair", "messages": [], "temperature": NaN}',
    "a huge number": b'{"model": "pair", "messages": [], "seed": 1' + b"0" * 5000 + b"}",
    "a lone surrogate": json.dumps(
        {"model": "pair", "messages": [{"role": "user", "content": "\ud800"}]}
    ).encode(),
    "a null byte in a key": b'{"mo\\u0000del": "pair"}',
}


@pytest.mark.parametrize("body", BROKEN_BODIES.values(), ids=BROKEN_BODIES)
def test_a_broken_body_is_a_400_with_the_shape_of_all_errors(
    server: ServerProcess, body: bytes
) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", content=body, timeout=60)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(response.content) < 1500


@pytest.mark.parametrize("value", [{"temperature": 5e-324}, {"top_p": 5e-324}, {"min_p": 1}])
@pytest.mark.parametrize("penalty", [0.01, 10])
def test_extreme_sampling_parameters_still_draw_tokens(
    server: ServerProcess, value: dict[str, float], penalty: float
) -> None:
    fields = value | {"repetition_penalty": penalty, "presence_penalty": -2}
    body = long_answer(server, **{"max_tokens": 20, "temperature": 1} | fields)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 20


def test_a_body_that_is_too_long_is_a_413_before_all_of_it_is_sent(server: ServerProcess) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(raw_request(b" " * (9 * 2**20), length=2**33))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert_still_right(server)


def test_an_unfinished_body_does_not_block_other_requests(server: ServerProcess) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(raw_request(b'{"model": "pa', length=100))
        assert_still_right(server)
        assert server.is_idle()


# --- the end of the engine, and of the server ----------------------------------------------------


async def answers_under_load(
    server: ServerProcess, max_tokens: int, end: Callable[[], None]
) -> list[httpx.Response]:
    """Returns the answers of eight requests, of which every other one is a stream.

    `end` is called once as many of them run as may run at a time.
    """
    bodies = [
        server.chat_body("forever", max_tokens=max_tokens, stream=n % 2 == 0) for n in range(8)
    ]
    answers = asyncio.create_task(post_all(server, bodies))
    await asyncio.to_thread(
        wait_until, lambda: server.gauge("mi_num_requests_running") == MAX_NUM_SEQS
    )
    end()
    return await answers


def test_an_engine_killed_under_load_ends_every_answer_once(start_fake: StartFake) -> None:
    """It runs on the fake engine, as the server only sees the end of the pipe."""
    server = start_fake(*SMALL, worker=["--step-seconds", "0.01"])
    responses = asyncio.run(answers_under_load(server, 1500, lambda: server.engine.kill()))
    assert len(responses) == 8
    for index, response in enumerate(responses):
        if index % 2 == 0:
            assert response.status_code == 200
            assert terminal_events(response.text) == ["engine_dead"]
        else:
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_dead"
    assert server.exit_code() == 1


def test_sigterm_under_load_lets_every_answer_finish(start_fake: StartFake) -> None:
    """It runs on the fake engine, as the signal goes to the server alone."""
    server = start_fake(*SMALL, worker=["--step-seconds", "0.01"])
    responses = asyncio.run(answers_under_load(server, 120, server.terminate))
    assert [response.status_code for response in responses] == [200] * 8
    for index, response in enumerate(responses):
        if index % 2 == 0:
            assert terminal_events(response.text) == ["length"]
        else:
            assert response.json()["usage"]["completion_tokens"] == 120
    assert server.exit_code() == 0
