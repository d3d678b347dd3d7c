"""The folders that benchmarks read and write. Uses only the standard library."""

from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).parents[2]
RESULTS: Final = CHECKOUT / "bench" / "results"  # JSON that is kept
BUILD: Final = Path("build/bench")  # what can be made again
