"""The ready message names the model, its memory and its kernels, and a request to try."""

from dataclasses import replace

import pytest

from server.api.ready_message import describe_engine, ready_message
from tests.server.engine_info import ENGINE_INFO


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (4_820_000, "4.82 MB"),
        (8_043_000_000, "8.04 GB"),
        (1_234_000_000_000, "1234 GB"),
    ],
)
def test_sizes_have_three_digits(count: int, size: str) -> None:
    assert f", {size} at the peak of loading" in describe_engine(
        replace(ENGINE_INFO, peak_bytes=count)
    )


def test_deltas_pair_kernels_and_cuda_graphs_are_named_only_if_there_are_any() -> None:
    plain = describe_engine(ENGINE_INFO)
    assert "qwen3, float32 on cpu" in plain
    assert "delta" not in plain
    assert "kernels" not in plain
    full = replace(
        ENGINE_INFO, delta_dtype="int8", pair_kernels="up to 64 rows", graphs="70 captured"
    )
    described = describe_engine(full)
    assert "float32 and int8 delta on cpu" in described
    assert "pair kernels up to 64 rows; CUDA graphs: 70 captured; " in described


@pytest.mark.parametrize("needs_key", [True, False])
def test_the_request_to_try_has_a_key_only_if_the_server_needs_one(needs_key: bool) -> None:
    text = ready_message(
        model="m", profile="p", address="http://h:1", info=ENGINE_INFO, needs_key=needs_key
    )
    assert text.startswith("Ready: m (qwen3, ")
    assert "profile p) at http://h:1\n" in text
    assert "curl http://h:1/v1/chat/completions" in text
    assert ("Authorization: Bearer KEY" in text) is needs_key
