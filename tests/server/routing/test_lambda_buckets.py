"""Every λ falls into one of ten ranges."""

import pytest

from server.routing.lambda_buckets import lambda_bucket


@pytest.mark.parametrize(
    ("at", "bucket"),
    [
        (0.0, "0.0-0.1"),
        (0.1, "0.1-0.2"),
        (0.3, "0.3-0.4"),
        (0.6, "0.6-0.7"),
        (0.69, "0.6-0.7"),
        (0.7, "0.7-0.8"),
        (1.0, "0.9-1.0"),
    ],
)
def test_a_lambda_falls_into_one_of_ten_buckets(at: float, bucket: str) -> None:
    assert lambda_bucket(at) == bucket


def test_every_grid_point_has_one_of_ten_labels() -> None:
    assert len({lambda_bucket(cell / 100) for cell in range(101)}) == 10
