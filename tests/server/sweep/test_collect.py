"""Samples are collected from a server that may be busy, slow or wrong, and answers are read."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.sweep.collect import RequestOptions, collect_samples, read_answer, request_body
from server.sweep.errors import BadParameters, SweepError
from server.sweep.graders import grader_named
from server.sweep.grid import Decoding, PlannedSample, Setting, planned_samples
from server.sweep.http_client import FIRST_TRIES, TRIES, ServedPair, ServerClient
from server.sweep.samples import SampleLog
from server.sweep.tasks import Question

PAIR = ServedPair("pair", "abc", "I", "T", layers=6)
QUESTION = Question("q", ({"role": "user", "content": "a=7. a?"},), "7")
OPTIONS = RequestOptions(seed=0, max_tokens=64, grader=grader_named("embedded"))
UNIT = PlannedSample(Setting(0.5, "all", Decoding(0.7, 0.9, 20)), QUESTION, 1)

AnswerRequest = Callable[[httpx.Request], httpx.Response]


def answer_body(content: str = "Answer: 7", **fields: Any) -> dict[str, Any]:
    message = {"content": content}
    if "reasoning" in fields:
        message["reasoning_content"] = fields["reasoning"]
    details = {"reasoning_tokens": fields.get("reasoning_tokens", 0)}
    return {
        "choices": [{"message": message, "finish_reason": fields.get("finish", "stop")}],
        "usage": {"completion_tokens": 9, "completion_tokens_details": details},
    }


def response(body: Any = None, **fields: Any) -> httpx.Response:
    headers = {"X-Reasoning-Lambda": "0.5"} | fields.pop("headers", {})
    return httpx.Response(
        fields.pop("status", 200), json=body or answer_body(**fields), headers=headers
    )


def client_of(answer: AnswerRequest, concurrency: int = 1) -> ServerClient:
    transport = httpx.MockTransport(answer)
    return ServerClient(
        "http://server/v1",
        api_key="secret",
        timeout=5,
        concurrency=concurrency,
        transport=transport,
    )


def collect(
    answer: AnswerRequest, path: Path, units: list[PlannedSample], concurrency: int = 4
) -> SampleLog:
    async def run() -> SampleLog:
        with SampleLog(path, {}) as log:
            async with client_of(answer, concurrency) as server:
                await collect_samples(
                    units,
                    server,
                    PAIR,
                    OPTIONS,
                    log,
                    on_sample=lambda sample: None,
                )
        return log

    return asyncio.run(run())


def units(count: int) -> list[PlannedSample]:
    return list(planned_samples([(UNIT.setting, range(count))], [QUESTION]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "samples.jsonl"


def test_a_request_has_every_parameter_of_its_setting() -> None:
    assert request_body(UNIT, PAIR, OPTIONS) == {
        "model": "pair",
        "messages": [{"role": "user", "content": "a=7. a?"}],
        "reasoning_lambda": 0.5,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "seed": UNIT.seed(0),
        "max_tokens": 64,
    }


@pytest.mark.parametrize(
    ("body", "thought", "malformed", "unfinished", "reading"),
    [
        (answer_body(), False, False, False, "7"),
        (answer_body(reasoning="a=7", reasoning_tokens=4), True, False, False, "7"),
        (answer_body(reasoning_tokens=1), True, False, False, "7"),  # a block of line breaks
        (answer_body("seven"), False, True, False, None),
        (answer_body(""), False, True, False, None),
        (answer_body("x</think>Answer: 7"), True, True, False, "7"),
        (answer_body("<tool_call>Answer: 7"), False, True, False, "7"),
        # Cut inside the block: the reasoning is graded, as in the paper.
        (
            answer_body("", reasoning="Answer: 7", reasoning_tokens=9, finish="length"),
            False,
            False,
            True,
            "7",
        ),
        (
            answer_body("An", reasoning="Answer: 7", reasoning_tokens=5, finish="length"),
            True,
            False,
            True,
            None,
        ),
    ],
)
def test_an_answer_is_classified_and_graded(
    body: dict[str, Any], thought: bool, malformed: bool, unfinished: bool, reading: str | None
) -> None:
    sample = read_answer(UNIT, body, OPTIONS.grader)
    assert (sample.thought, sample.malformed, sample.unfinished) == (thought, malformed, unfinished)
    assert (sample.said, sample.correct) == (reading, reading == "7")
    assert (sample.key, sample.tokens) == (UNIT.key, 9)


def test_every_planned_sample_is_requested_once_unless_the_file_has_it(path: Path) -> None:
    seen: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        seen.append(json.loads(request.content)["seed"])
        return response()

    collect(answer, path, units(3))
    log = collect(answer, path, units(10))
    assert len(log.samples) == len(seen) == len(set(seen)) == 10


def test_no_more_requests_are_open_at_once_than_allowed(path: Path) -> None:
    open_now, most = 0, 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0)
        open_now -= 1
        return response()

    collect(answer, path, units(20), concurrency=3)  # type: ignore[arg-type]
    assert most == 3


@pytest.mark.parametrize("status", [429, 503])
def test_a_request_to_a_busy_server_is_repeated(path: Path, status: int) -> None:
    tries = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        if tries < TRIES:
            return response({"error": {}}, status=status, headers={"Retry-After": "0"})
        return response()

    assert len(collect(answer, path, units(1)).samples) == 1
    assert tries == TRIES


def test_a_server_that_stays_busy_ends_the_run_which_keeps_finished_samples(path: Path) -> None:
    answers = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal answers
        answers += 1
        if answers <= 2:
            return response()
        refusal = {"error": {"message": "full"}}
        return response(refusal, status=503, headers={"Retry-After": "0"})

    with pytest.raises(SweepError, match="did not answer in 6 tries: 503 full"):
        collect(answer, path, units(5), concurrency=1)
    assert len(collect(lambda request: response(), path, units(2)).samples) == 2


@pytest.mark.parametrize("status", [400, 401, 500, 504])
def test_a_refusal_ends_the_run_at_once(path: Path, status: int) -> None:
    tries = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        return response({"error": {"message": "no such field"}}, status=status)

    with pytest.raises(SweepError, match=f"refused: {status} no such field"):
        collect(answer, path, units(5), concurrency=1)
    assert tries == 1


def test_a_request_that_takes_too_long_is_not_repeated(path: Path) -> None:
    tries = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        raise httpx.ReadTimeout("late")

    with pytest.raises(SweepError, match="no answer within --timeout"):
        collect(answer, path, units(5), concurrency=1)
    assert tries == 1


def test_a_server_that_ran_another_lambda_is_an_error(path: Path) -> None:
    with pytest.raises(BadParameters, match=r"rounded λ = 0.5 to 0.6"):
        collect(lambda request: response(headers={"X-Reasoning-Lambda": "0.6"}), path, units(1))


# --- the pair ------------------------------------------------------------------------------------

CARDS = [
    {"id": "one", "parent": None, "pair": {"identity": "1", "instruct": "I", "thinking": "T",
                                           "layers": 4}},
    {"id": "one@0.5", "parent": "one", "pair": None},
]  # fmt: skip


def pair_at(cards: Any, model: str | None) -> ServedPair:
    async def run() -> ServedPair:
        async with client_of(lambda request: httpx.Response(200, json={"data": cards})) as server:
            return await server.pair(model)

    return asyncio.run(run())


def test_the_only_model_is_taken_where_none_is_named() -> None:
    assert pair_at(CARDS, None) == ServedPair("one", "1", "I", "T", 4)


@pytest.mark.parametrize(
    ("cards", "model", "reason"),
    [
        (CARDS, "two", "serves no model 'two', but one"),
        ([{"id": "gpt"}], None, "does not name the pair"),
        ([], None, "serves no model"),
    ],
)
def test_a_server_without_the_pair_is_refused(cards: Any, model: str | None, reason: str) -> None:
    with pytest.raises(BadParameters, match=reason):
        pair_at(cards, model)


def test_a_wrong_address_is_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    def gone(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        raise httpx.ConnectError("refused")

    async def no_pause(seconds: float) -> None: ...

    async def run(server: ServerClient) -> None:
        async with server:
            await server.pair(None)

    monkeypatch.setattr("server.sweep.http_client.asyncio.sleep", no_pause)
    with pytest.raises(SweepError, match="3 tries: refused"):
        asyncio.run(run(client_of(gone)))
    assert tries == FIRST_TRIES
    with pytest.raises(BadParameters, match="not the URL"):
        asyncio.run(run(ServerClient("localhost:8000", api_key=None, timeout=1)))
