"""The folders that benchmarks read and write. Uses only the standard library."""

from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).parents[2]
RESULTS: Final = CHECKOUT / "bench" / "results"  # results that are committed
BUILD: Final = Path("build/bench")  # files that can be made again
