"""Identifies who sends a request: by its API key, or by its address if the server has no keys.

Only digests of keys are stored. A presented key is compared with every stored one, and all digests
have the same length, so the time that a comparison takes reveals nothing about a key.
"""

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from server.exit_codes import CommandError
from server.wire.errors import InvalidApiKey

SCHEME: Final = b"bearer "


class KeyFileError(CommandError):
    """The configured keys cannot be used. The message is for the operator and shows no key."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Identifies the quota and the prompt cache of a request."""

    identity: str  # digest of the key; the client's address if the server has no keys
    name: str | None = None  # of the key, for the log; None if the server has no keys

    def cache_salt(self, requested: str) -> str:
        """Returns the salt of a request. Callers with different keys share no KV."""
        return requested if self.name is None else f"{self.identity}/{requested}"


@dataclass(frozen=True, slots=True)
class _Key:
    name: str
    digest: bytes


class KeyRing:
    """The keys of a server. Without any, every request is accepted."""

    def __init__(self, keys: Sequence[tuple[str, str]]) -> None:
        """Takes (key, name) pairs; an empty name becomes `key1`, `key2` … Raises `KeyFileError`."""
        self._keys = [
            _Key(name or f"key{number}", _digest(key.encode()))
            for number, (key, name) in enumerate(keys, start=1)
        ]
        for number, (key, _) in enumerate(keys, start=1):
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise KeyFileError(f"API key {number} must be printable ASCII without spaces")
        if len({key.digest for key in self._keys}) < len(keys):
            raise KeyFileError("An API key is listed twice")

    @classmethod
    def of(cls, secrets: Sequence[SecretStr], file: Path | None) -> "KeyRing":
        given = [(secret.get_secret_value(), "") for secret in secrets]
        return cls([*given, *_keys_of(file)])

    def __bool__(self) -> bool:
        return bool(self._keys)

    def caller(self, authorization: bytes) -> Caller:
        """Returns the caller whose key is in the header. Raises `InvalidApiKey`."""
        scheme, presented = authorization[: len(SCHEME)], authorization[len(SCHEME) :]
        digest = _digest(presented.strip())
        matches = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if scheme.lower() != SCHEME or not matches:
            raise InvalidApiKey("Send a valid API key: `Authorization: Bearer KEY`")
        return Caller(identity=digest.hex(), name=matches[0].name)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _keys_of(file: Path | None) -> Iterator[tuple[str, str]]:
    if file is None:
        return
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{file}: not readable (--api-key-file): {error}") from None
    words = (line.partition("#")[0].split(maxsplit=1) for line in lines)
    keys = [line for line in words if line]
    if not keys:
        raise KeyFileError(f"{file}: no keys in it (--api-key-file)")
    for key, *name in keys:
        yield key, "".join(name).strip()
