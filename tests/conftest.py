"""For all tests: the same examples every time, and one thread for torch.

The threads must be said before torch loads; tests share few cores, and are not judged by the clock.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
