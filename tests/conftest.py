"""What all tests share: the same examples every time, one thread for torch, interpreted Triton.

The environment must be set before torch or triton load, and engine processes inherit it. Several
pytest workers share few cores; with more than one thread each, torch's threads would wait for one
another.
"""

import atexit
import gc
import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("long", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("same")


def pytest_collection_finish() -> None:
    """Exempts what the imports created from garbage collection, which else takes seconds."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
