"""The flags of a command's own server; that it lives and goes with the command is tested in
`tests/contract/test_measuring.py`."""

import pytest

from server.config import load_settings
from server.sweep.own_server import FIXED_FLAGS


def test_the_ready_line_does_not_depend_on_the_environments_log_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `MI_LOG_FORMAT=json` the ready line was not plain text, and the command waited on."""
    monkeypatch.setenv("MI_LOG_FORMAT", "json")
    assert load_settings(FIXED_FLAGS).log_format == "text"
