"""The flags of a command's own server do not depend on the environment.

`tests/contract/test_measuring.py` tests that it starts and ends with the command.
"""

import pytest

from server.config import load_settings
from server.sweep.own_server import FIXED_FLAGS


def test_the_environments_log_format_does_not_change_the_ready_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `MI_LOG_FORMAT=json` the ready line was JSON, and the command waited for ever."""
    monkeypatch.setenv("MI_LOG_FORMAT", "json")
    assert load_settings(FIXED_FLAGS).log_format == "text"
