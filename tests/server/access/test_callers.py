"""An API key names its caller, and no message, log or object shows a key."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from server.access.callers import Caller, KeyFileError, KeyRing
from server.wire.errors import InvalidApiKey


def key_ring(*keys: str) -> KeyRing:
    return KeyRing([(key, "") for key in keys])


def test_a_key_is_named_after_its_position() -> None:
    keys = key_ring("sk-one", "sk-two")
    assert keys.caller(b"Bearer sk-two").name == "key2"
    assert keys.caller(b"bearer sk-one").name == "key1"


REFUSED = (
    *(b"", b"Bearer", b"Bearer ", b"sk-one", b"Basic sk-one", b"Bearer sk-on", b"Bearer sk-oneX"),
    *(b"Bearer sk-one sk-two", b"Bearer \xff\x00"),
)


@pytest.mark.parametrize("header", REFUSED)
def test_any_other_header_is_refused_and_not_repeated(header: bytes) -> None:
    with pytest.raises(InvalidApiKey) as caught:
        key_ring("sk-one", "sk-two").caller(header)
    assert "sk-" not in caught.value.message
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}


def test_a_key_is_compared_with_all_keys_even_after_a_match(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("server.access.callers.hmac.compare_digest", compare)
    key_ring("a", "much-longer", "c").caller(b"Bearer a")
    assert compared == [(32, 32)] * 3


def test_each_line_of_a_key_file_is_a_key_and_a_name(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys of the team\n\nsk-1 search team  # since May\nsk-2\n")
    keys = KeyRing.of([SecretStr("sk-0")], file)
    names = [keys.caller(f"Bearer sk-{i}".encode()).name for i in range(3)]
    assert names == ["key1", "search team", "key3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("# none\n", "no keys in it"), ("sk-1\nsk-1 twice\n", "twice"), ("schlüssel\n", "ASCII")],
)
def test_a_key_file_that_cannot_be_used_is_refused_without_showing_its_keys(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(KeyFileError, match=message) as caught:
        KeyRing.of([], file)
    assert "sk-1" not in str(caught.value)
    with pytest.raises(KeyFileError, match="not readable"):
        KeyRing.of([], tmp_path / "none")


def test_the_key_ring_stores_no_plaintext_key() -> None:
    assert "sk-secret" not in repr(vars(key_ring("sk-secret")))


def test_callers_with_different_keys_have_different_cache_salts() -> None:
    keys = key_ring("sk-one", "sk-two")
    one, two = (keys.caller(b"Bearer sk-" + name) for name in (b"one", b"two"))
    assert (
        len({one.cache_salt(""), one.cache_salt("x"), two.cache_salt(""), two.cache_salt("x")}) == 4
    )
    assert one.cache_salt("x") == keys.caller(b"Bearer sk-one").cache_salt("x")
    assert "sk-one" not in one.cache_salt("")


def test_without_keys_the_cache_salt_is_the_requests_own() -> None:
    assert not KeyRing([])
    assert Caller("10.0.0.1").cache_salt("x") == "x"
