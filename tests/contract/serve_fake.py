"""`mi-server serve` with the fake worker as its engine: FLAGS -- WORKER_FLAGS."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from server.cli import main  # noqa: E402


def serve_fake() -> int:
    at = sys.argv.index("--")
    flags, worker_flags = sys.argv[1:at], sys.argv[at + 1 :]
    worker = ROOT / "tests" / "server" / "fake_worker.py"
    return main(["serve", *flags], [sys.executable, str(worker), *worker_flags])


if __name__ == "__main__":
    sys.exit(serve_fake())
