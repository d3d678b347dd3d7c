"""Ten labels for ten ranges of λ, by which metrics and observations are counted."""

from typing import Final

LAMBDA_BUCKETS: Final = 10


def lambda_bucket(value: float) -> str:
    """One of ten labels, `0.0-0.1` to `0.9-1.0`; the last one has its upper end."""
    low = min(int(value * LAMBDA_BUCKETS + 1e-9), LAMBDA_BUCKETS - 1)
    return f"{low / LAMBDA_BUCKETS:.1f}-{(low + 1) / LAMBDA_BUCKETS:.1f}"
