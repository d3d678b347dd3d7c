"""What a small engine reports once it has loaded."""

from typing import Final

from mi_runtime.request import EngineInfo

ENGINE_INFO: Final = EngineInfo(
    pair_identity="1" * 32,
    fingerprint="f",
    model_type="qwen3",
    device="cpu",
    dtype="float32",
    delta_dtype="none",
    vocab_size=320,
    max_model_len=100,
    block_size=16,
    num_blocks=64,
    layers=4,
    weight_bytes=0,
    peak_bytes=0,
    load_seconds=0.0,
)
