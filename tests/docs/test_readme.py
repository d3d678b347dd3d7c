"""The speed in `README.md` is that of `bench/results`, and the families there are tested ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
SPEED = PAGE.partition("\n## Speed\n")[2].partition("\n## ")[0]
ROWS = {
    'at one λ, whose weights are cached ("hot")': "b/a decode, one hot λ",
    "at 32 different λ": "c/a decode, 32 λ",
    "at λ = 0": "e/a decode, λ = 0",
    "against eight such engines": "d/h, 8 λ against eight engines",
}


def kept(name: str) -> Any:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_the_ratios_of_both_pairs(row: str) -> None:
    (line,) = [line for line in SPEED.splitlines() if row in line and line.startswith("|")]
    shown = [float(cell.split()[0]) for cell in line.strip("| ").split("|")[1:]]
    decimals = 1 if "times" in line else 2
    for name, value in zip(("embedded", "midsize"), shown, strict=True):
        assert value == round(kept(f"engine-{name}")["ratios"][ROWS[row]], decimals)


def test_the_comparisons_have_the_ratios_of_both_pairs() -> None:
    embedded, midsize = kept("engine-embedded")["ratios"], kept("engine-midsize")["ratios"]
    batching, first = "c / continuous batching at one λ", "f, never-seen λ / hot λ"
    words = " ".join(SPEED.split())
    assert f"{embedded[batching]:.1f} times as fast on the embedded pair" in words
    assert f"{midsize[batching]:.2f} times with Qwen3-0.6B's shapes" in words
    assert f"{embedded[first]:.1f} (embedded) to {midsize[first]:.1f} times" in words


def test_the_figures_of_the_server_match_the_kept_results() -> None:
    words = " ".join(SPEED.split())
    serving, token = kept("serving")["ratios"], kept("latency-token")["rows"]
    assert f"reach {serving['HTTP / engine alone']:.2f} of" in words
    assert f"ready after {serving['seconds from start to ready']:.1f} s" in words
    assert f"adds {token['p50']['median']:.1f} ms to a token in the median" in words
    assert f"and {token['p99']['median']:.1f} ms at p99" in words
    refusals = [row["median"] for row in kept("latency-refusal")["rows"].values()]
    assert f"takes {min(refusals):.1f} to {max(refusals):.1f} ms" in words
    choosing = [row["median"] for row in kept("routing")["rows"].values()]
    assert f"choosing λ {min(choosing):.0f} to {max(choosing):.0f} µs" in words
    masks = kept("grammar")["ratios"]
    small, large = (masks[f"{name}, record: mask, µs"] for name in ("embedded", "151,936 tokens"))
    assert f"mask {small:.0f} µs with a vocabulary of 320 tokens" in words
    assert f"and {large:.0f} µs with one of 151,936" in words


def test_the_section_names_the_versions_that_were_measured() -> None:
    machine = kept("engine-embedded")["machine"]
    for library in ("torch", "transformers"):
        version = re.match(r"\d+\.\d+", machine[library])
        assert version is not None
        assert f"{library} {version[0]}" in SPEED


def test_the_supported_families_are_those_that_are_tested() -> None:
    from tests.runtime.families import FAMILIES  # imports torch

    (listed,) = re.findall(r"Supported model families, .*?: (.*?)\. The server", PAGE, re.DOTALL)
    words = {"and", "the", "mixtures", "of", "experts", "text"}
    names = set(re.findall(r"\w+", listed)) - words
    assert names == {family.removesuffix("_text") for family in FAMILIES}
