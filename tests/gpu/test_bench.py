"""The GPU bench runs on a GPU: every row of the engine on tiny shapes, none with an error."""

import json
from pathlib import Path

import pytest

from bench.gpu.__main__ import main


@pytest.mark.parametrize("model", ["4b", "30b-a3b"])
def test_no_row_fails_on_tiny_shapes(model: str, tmp_path: Path) -> None:
    engine = "card,static,pair,int8,int4"
    assert main(["--smoke", "--model", model, "--only", engine, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert not [row for row in rows if "error" in row]
    assert {row["subject"] for row in rows if "share" in row} == {*engine.split(",")} - {"card"}
