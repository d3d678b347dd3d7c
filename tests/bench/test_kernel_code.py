"""The kernels compile for a Hopper GPU (9.0), which is not needed, and fit on it."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import kernel_code

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
KERNELS = {"attend_kernel", "add_parts_kernel", "write_kernel", "_product", "_sum_splits"}
SHARED = 1024 * kernel_code.SHARED[90]


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns what `without_a_card.py` prints in a process of its own, as Triton compiles here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = str(tmp_path_factory.mktemp("carried"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.bench.without_a_card", folder],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_kernel_fits_and_spills_no_registers(looked_at: dict[str, Any]) -> None:
    assert {one["kernel"] for one in looked_at["compiled"]} == KERNELS
    for one in looked_at["compiled"]:
        assert one["shared"] <= SHARED, one
        assert one["spilled"] == 0, one


def test_two_programs_of_a_decode_fit_on_one_multiprocessor(looked_at: dict[str, Any]) -> None:
    """One loads while the other computes."""
    decodes = [one for one in attending(looked_at) if "decode" in one["cases"][0]]
    assert len(decodes) == 2
    assert max(one["shared"] for one in decodes) * 2 <= SHARED


def test_the_next_tile_is_loaded_while_one_is_computed(looked_at: dict[str, Any]) -> None:
    """The compiler loads ahead only if it has the addresses early, so block tables are read ahead.

    In flight are the keys and the values of one tile; in a product, both endpoints of one tile or
    more. Without tensor cores, in fp32, nothing is loaded ahead."""
    assert len(attending(looked_at)) == 5
    for one in attending(looked_at):
        assert one["in_flight"] == 2, one
    for one in products(looked_at):
        assert one["in_flight"] >= 2, one


def test_64_rows_and_more_are_multiplied_by_wgmma(
    looked_at: dict[str, Any],
) -> None:
    """It needs at least 64 rows."""
    dense = [one for one in products(looked_at) if "experts" not in one["cases"][0]]
    assert len(dense) >= 8
    for one in dense:
        rows = int(one["cases"][0].rsplit(" ", 1)[1])
        assert one["tensor_cores"] == ("wgmma" if rows >= 64 else "mma.sync"), one


def test_a_model_needs_some_dozens_of_kernels(looked_at: dict[str, Any]) -> None:
    """A compilation takes a second, and the first step that launches a kernel waits for it.

    Products have 3 kinds and 4 sizes of tiles, with K split or not. Each projection of experts has
    4 kinds and 4 sizes, never split. Attention is decode or prefill, split or not."""
    for model, kernels in looked_at["variants"].items():
        counts = Counter(kernel.split()[0] for kernel in kernels)
        experts = 2 * 4 * 4 if model == "30b-a3b" else 0
        assert counts["_product"] <= 3 * 4 * 2 + experts
        assert counts["attend_kernel"] <= 4
        assert counts["add_parts_kernel"] <= 6  # 2 to 64 parts
        assert counts["_sum_splits"] <= 7  # 2 to 8
        assert counts["write_kernel"] == 1
    shared = set.intersection(*map(set, looked_at["variants"].values()))
    assert len(shared) > 20, "models of other sizes take the same products"


def test_the_command_compiles_the_kernels_that_a_model_launches(looked_at: dict[str, Any]) -> None:
    for model, launched in looked_at["launched"]:
        assert {kernel.split()[0] for kernel in launched} >= {"attend_kernel", "_product"}
        assert set(launched) <= set(looked_at["known"][model]), model


def test_an_unpacked_cache_is_used(looked_at: dict[str, Any]) -> None:
    assert looked_at["carried"] == {"packed": [False], "unpacked": 1, "found": [True]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--unpack", "{file}"], "need each other"),
        (["--unpack", "{file}", "--into", "{folder}"], "ReadError"),
        (["--unpack", "{file}.gone", "--into", "{folder}"], "FileNotFoundError"),
        (["--capability", "42"], "invalid choice"),
        ([], "TRITON_INTERPRET must not be set"),
    ],
)
def test_bad_arguments_and_files_are_reported(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = tmp_path / "garbage"
    file.write_text("garbage")
    with pytest.raises(SystemExit, match="2"):
        kernel_code.main([flag.format(file=file, folder=tmp_path) for flag in flags])
    assert message in capsys.readouterr().err


def attending(looked_at: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in looked_at["compiled"] if one["kernel"] == "attend_kernel"]


def products(looked_at: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the products in 16 bits; in fp32 no tensor core multiplies."""
    kernels = [one for one in looked_at["compiled"] if one["kernel"] == "_product"]
    return [one for one in kernels if one["tensor_cores"]]
