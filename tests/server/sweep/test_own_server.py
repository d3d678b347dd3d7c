"""The flags of a command's own server, and how it ends.

`tests/contract/test_measuring.py` tests that it answers, and that it ends with a killed command.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.config import load_settings
from server.sweep.own_server import FIXED_FLAGS, own_server


def test_the_environments_log_format_does_not_change_the_ready_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `MI_LOG_FORMAT=json` the ready line was JSON, and the command waited for ever."""
    monkeypatch.setenv("MI_LOG_FORMAT", "json")
    assert load_settings(FIXED_FLAGS).log_format == "text"


ENDS_WITH_ITS_INPUT = """
import sys
print("Ready: pair at http://127.0.0.1:1", flush=True)
sys.stdin.read()
"""


def test_a_server_is_gone_when_its_context_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def start_another(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        assert command[1:3] == ["-m", "server.sweep.own_server"]
        started.append(start([sys.executable, "-c", ENDS_WITH_ITS_INPUT], **options))
        return started[0]

    monkeypatch.setattr("server.sweep.own_server.subprocess.Popen", start_another)
    with own_server([], tmp_path / "log") as url:
        assert url == "http://127.0.0.1:1"
        assert started[0].poll() is None
    assert started[0].poll() == 0
