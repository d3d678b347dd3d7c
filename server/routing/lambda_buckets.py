"""Ten ranges of λ, which label metrics and observed lengths."""

from typing import Final

LAMBDA_BUCKETS: Final = 10


def lambda_bucket(value: float) -> str:
    """Returns the label of λ's range, `0.0-0.1` to `0.9-1.0`; 1.0 belongs to the last."""
    low = min(int(value * LAMBDA_BUCKETS + 1e-9), LAMBDA_BUCKETS - 1)
    return f"{low / LAMBDA_BUCKETS:.1f}-{(low + 1) / LAMBDA_BUCKETS:.1f}"
