"""Asking a server for answers over HTTP, many at once, and grading what comes back.

The paper grades an answer that never closed its think block whole; so does this. An answer counts
as malformed where it ended by itself, and either the grader reads nothing in it or a tag that
belongs around reasoning stands in its text. An answer cut by its length is unfinished, never
malformed.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from typing import Any, Final, Self

import httpx

from server.sweep.errors import BadParameters, SweepError
from server.sweep.graders import Grader
from server.sweep.samples import Sample, SampleLog
from server.sweep.settings import Unit, wire_dial

TRIES: Final = 6
FIRST_TRIES: Final = 3  # of the first contact: an address may be wrong
LONGEST_PAUSE: Final = 30.0  # seconds between two tries
STRAY_TAGS: Final = ("<think>", "</think>", "<tool_call>")
_LAMBDA_HEADER: Final = "X-Reasoning-Lambda"
_CONNECTIONS: Final = 16
"""Of one client: at every request it looks through all that it has."""


@dataclass(frozen=True, slots=True)
class ServedPair:
    """What a server says of its pair."""

    model: str
    identity: str
    instruct: str
    thinking: str
    layers: int


@dataclass(frozen=True, slots=True)
class Asking:
    """Everything that all requests of a sweep have in common."""

    seed: int
    max_tokens: int | None  # None: as many as the context holds
    grader: Grader


class Server:
    """A running server at `url`. Use it as an asynchronous context."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        timeout: float,  # seconds that an answer may take
        concurrency: int = 1,  # requests in flight
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url
        self.concurrency = concurrency
        context = httpx.create_ssl_context()  # costs as much as ten answers
        self._clients = [
            httpx.AsyncClient(
                base_url=url.rstrip("/").removesuffix("/v1"),
                headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
                verify=context,
                transport=transport,
                timeout=httpx.Timeout(timeout, connect=10.0, pool=None),
            )
            for _ in range(ceil(concurrency / _CONNECTIONS))
        ]
        self._next = cycle(self._clients)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for client in self._clients:
            await client.aclose()

    async def pair(self, model: str | None) -> ServedPair:
        """The pair behind `model`, or the only one, once it is loaded. Raises `SweepError`."""
        await self._request("GET", "/ready", tries=FIRST_TRIES)
        cards = (await self._request("GET", "/v1/models")).json()["data"]
        names = [card["id"] for card in cards if card.get("parent") is None]
        name = names[0] if model is None and names else model
        card = next((card for card in cards if card["id"] == name), None)
        if card is None:
            raise BadParameters(f"{self._url} serves no model {name!r}, but {', '.join(names)}")
        pair = card.get("pair")
        if pair is None:
            raise BadParameters(f"{self._url} is no mi-server, or an older one: it names no pair")
        facts = (pair[name] for name in ("identity", "instruct", "thinking", "layers"))
        return ServedPair(card["id"], *facts)

    async def complete(self, body: Mapping[str, Any]) -> httpx.Response:
        return await self._request("POST", "/v1/chat/completions", body)

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, tries: int = TRIES
    ) -> httpx.Response:
        """Tries again where the server was busy or the connection failed; raises `SweepError`."""
        for attempt in range(1, tries + 1):
            pause = min(2.0 ** (attempt - 1), LONGEST_PAUSE)
            try:
                response = await next(self._next).request(method, path, json=body)
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise BadParameters(f"{self._url!r} is no URL of a server: {error}") from None
            except httpx.ReadTimeout:  # a second try would take as long
                raise SweepError(f"{self._url} sent no answer within --timeout") from None
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
            else:
                if response.is_success:
                    return response
                why = _refusal(response)
                if response.status_code not in (408, 429, 502, 503):
                    raise SweepError(f"{self._url} refused: {why}")
                pause = _asked_pause(response, pause)
            if attempt < tries:
                await asyncio.sleep(pause)
        raise SweepError(f"{self._url} did not answer in {tries} tries: {why}")


def _refusal(response: httpx.Response) -> str:
    try:
        return f"{response.status_code} {response.json()['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"{response.status_code} {response.text[:200]}"


def _asked_pause(response: httpx.Response, otherwise: float) -> float:
    said = response.headers.get("Retry-After", "")
    return min(float(said), 2 * LONGEST_PAUSE) if said.isdigit() else otherwise


async def ask_all(
    units: Iterable[Unit],
    server: Server,
    pair: ServedPair,
    asking: Asking,
    log: SampleLog,
    on_sample: Callable[[Sample], None],
) -> None:
    """Ask for every unit that the log lacks. The first error ends all; the log keeps the rest."""
    left = iter([unit for unit in units if unit.key not in log.samples])
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(server.concurrency):
                group.create_task(_work(left, server, pair, asking, log, on_sample))
    except* SweepError as errors:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


async def _work(
    left: Iterator[Unit],
    server: Server,
    pair: ServedPair,
    asking: Asking,
    log: SampleLog,
    on_sample: Callable[[Sample], None],
) -> None:
    for unit in left:
        response = await server.complete(request_body(unit, pair, asking))
        _check_lambda(unit, response)
        sample = read_answer(unit, response.json(), asking.grader)
        log.add(sample)
        on_sample(sample)


def request_body(unit: Unit, pair: ServedPair, asking: Asking) -> dict[str, Any]:
    setting = unit.setting
    decoding = setting.decoding
    body: dict[str, Any] = {
        "model": pair.model,
        "messages": list(unit.question.messages),
        "reasoning_lambda": wire_dial(setting.dial, setting.reasoning_lambda, pair.layers),
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
        "seed": unit.seed(asking.seed),
    }
    return body if asking.max_tokens is None else body | {"max_tokens": asking.max_tokens}


def _check_lambda(unit: Unit, response: httpx.Response) -> None:
    """A server with a coarser grid would answer at another λ than the report says."""
    ran = response.headers.get(_LAMBDA_HEADER, "")
    if ran != f"{unit.setting.reasoning_lambda:g}":
        raise BadParameters(
            f"the server ran λ = {unit.setting.reasoning_lambda:g} as {ran or 'something else'}; "
            "ask for values on its grid (--lambda-step)"
        )


def read_answer(unit: Unit, body: Mapping[str, Any], grader: Grader) -> Sample:
    """The sample of a plain answer's body."""
    choice, usage = body["choices"][0], body["usage"]
    message = choice["message"]
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    unfinished = choice["finish_reason"] == "length"
    reasoning_tokens = usage["completion_tokens_details"]["reasoning_tokens"]
    closed = bool(reasoning or reasoning_tokens) and not (unfinished and not content)
    text = content if closed else reasoning + content
    grade = grader.grade(unit.question, text)
    stray = any(tag in content for tag in STRAY_TAGS)
    setting, question, sample = unit.key
    return Sample(
        setting=setting,
        question=question,
        sample=sample,
        correct=grade.correct,
        said=grade.said,
        tokens=usage["completion_tokens"],
        reasoning_tokens=reasoning_tokens,
        thought=closed or "</think>" in content,
        malformed=not unfinished and (grade.said is None or stray),
        unfinished=unfinished,
        text=text,
    )
