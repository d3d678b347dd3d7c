"""The flags of a command's own server; that it lives and goes with the command is tested in
`tests/contract/test_measuring.py`."""

import pytest

from server.config import load_settings
from server.sweep.own_server import FIXED_FLAGS


def test_whatever_the_environment_says_of_logs_the_server_says_that_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `MI_LOG_FORMAT=json` it never said so in words, and the command waited for ever."""
    monkeypatch.setenv("MI_LOG_FORMAT", "json")
    assert load_settings(FIXED_FLAGS).log_format == "text"
