"""For all tests: the same examples every time, one thread for torch, and Triton interpreted.

Both must be said before torch or triton load; tests share few cores, are not judged by the clock,
and run kernels on a CPU.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
