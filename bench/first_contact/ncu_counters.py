"""Reads counters of the pair kernel with `ncu`, if it is installed. It does not change the clocks.

python -m bench.first_contact.ncu_counters        makes the launches that ncu profiles
"""

import csv
import shutil
import subprocess
import sys
from typing import Any, Final

from bench.gpu.cases import Skipped

COUNTERS: Final = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
)
LAUNCHES: Final = 3  # launches of the pair product, of which the last is read
NCU_SECONDS: Final = 45
FLAGS: Final = (
    "--clock-control=none",
    "--kernel-name=regex:_product",
    f"--launch-skip={LAUNCHES - 1}",
    "--launch-count=1",
    "--csv",
    "--page=raw",
    f"--metrics={','.join(COUNTERS)}",
)
Facts = dict[str, Any]


def launch_pair_product(smoke: bool) -> None:
    """Launches the gate and up product of Qwen3-4B for 32 rows, each at another λ."""
    import torch

    from mi_runtime.kernels.pair_linear import pair_linear

    device = "cpu" if smoke else "cuda"
    dtype = torch.float32 if smoke else torch.bfloat16
    rows, columns, depth = (4, 40, 256) if smoke else (32, 19456, 2560)
    both = torch.randn(columns, 2, depth, device=device).to(dtype)
    x = torch.randn(rows, depth, device=device).to(dtype)
    weights = torch.rand(rows, device=device)
    for _ in range(LAUNCHES):
        pair_linear(x, both[:, 0], both[:, 1], weights)
    if not smoke:
        torch.cuda.synchronize()


def counters(smoke: bool) -> Facts:
    """Returns the counters of the last launch. A rehearsal only makes the launches."""
    if smoke:
        launch_pair_product(smoke)
        raise Skipped("rehearsed without a GPU")
    if shutil.which("ncu") is None:
        raise Skipped("there is no ncu")
    command = ["ncu", *FLAGS, sys.executable, "-m", "bench.first_contact.ncu_counters"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=NCU_SECONDS, check=False)
    found = counted(done.stdout)
    if not found:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-400:]}")
    share = found.get("dram__throughput.avg.pct_of_peak_sustained_elapsed", "?")
    return {"figure": f"pair kernel {share} % of the memory's peak", "counters": found}


def counted(output: str) -> Facts:
    """Parses the CSV that ncu prints: one line of names, one of units, and one for each launch."""
    lines = output.splitlines()
    begin = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return {}
    names, units, *launches = csv.reader(lines[begin:])
    if not launches:
        return {}
    return {
        f"{name} [{unit}]" if unit not in ("", "%") else name: value
        for name, unit, value in zip(names, units, launches[-1], strict=True)
        if name in COUNTERS
    }


if __name__ == "__main__":
    launch_pair_product(smoke=False)
