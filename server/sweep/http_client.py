"""Sends requests to one server over HTTP, many at once, and tries again if it is busy."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from typing import Any, Final, Self

import httpx

from server.sweep.errors import BadParameters, SweepError

TRIES: Final = 6
FIRST_TRIES: Final = 3  # of the first request: the address may be wrong
LONGEST_PAUSE: Final = 30.0  # seconds between two tries
_CONNECTIONS: Final = 16
"""Connections of one `httpx` client, which searches all of them at every request."""


@dataclass(frozen=True, slots=True)
class ServedPair:
    """What a server reports about its pair."""

    model: str  # the served name
    identity: str  # digest of both endpoints
    instruct: str  # name of the endpoint
    thinking: str
    layers: int


class ServerClient:
    """A client of the server at `url`. Use it as an asynchronous context."""

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
        context = httpx.create_ssl_context()  # takes as long as ten answers
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
        """Returns the pair served as `model`, or the only one, once it is loaded.

        Raises `SweepError`.
        """
        await self._request("GET", "/ready", tries=FIRST_TRIES)
        cards = (await self._request("GET", "/v1/models")).json()["data"]
        names = [card["id"] for card in cards if card.get("parent") is None]
        name = names[0] if model is None and names else model
        card = next((card for card in cards if card["id"] == name), None)
        if card is None:
            raise BadParameters(f"{self._url} serves no model {name!r}, but {', '.join(names)}")
        pair = card.get("pair")
        if pair is None:
            raise BadParameters(
                f"{self._url} is not an mi-server, or is too old: /v1/models does not name the pair"
            )
        facts = (pair[name] for name in ("identity", "instruct", "thinking", "layers"))
        return ServedPair(card["id"], *facts)

    async def complete(self, body: Mapping[str, Any]) -> httpx.Response:
        """Sends a chat completion request. Raises `SweepError`."""
        return await self._request("POST", "/v1/chat/completions", body)

    async def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, tries: int = TRIES
    ) -> httpx.Response:
        """Returns the response; tries again if the server is busy or the connection fails.

        Raises `SweepError`.
        """
        for attempt in range(1, tries + 1):
            pause = min(2.0 ** (attempt - 1), LONGEST_PAUSE)
            try:
                response = await next(self._next).request(method, path, json=body)
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise BadParameters(f"{self._url!r} is not the URL of a server: {error}") from None
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
                pause = _retry_after(response, pause)
            if attempt < tries:
                await asyncio.sleep(pause)
        raise SweepError(f"{self._url} did not answer in {tries} tries: {why}")


def _refusal(response: httpx.Response) -> str:
    try:
        return f"{response.status_code} {response.json()['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"{response.status_code} {response.text[:200]}"


def _retry_after(response: httpx.Response, default: float) -> float:
    """Returns the seconds that the server asks for, bounded, or `default` if it names none."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), 2 * LONGEST_PAUSE) if value.isdigit() else default
