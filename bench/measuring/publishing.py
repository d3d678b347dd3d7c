"""Prints and writes the results of a benchmark: the machine, a table of medians, one JSON line."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from bench.measuring.folders import RESULTS


def machine() -> dict[str, Any]:
    """Returns the facts of this machine that every published number comes with."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def interleaved(rows: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Calls every row in turn, `rounds` times after a warm-up round. Returns each row's values."""
    values: dict[str, list[float]] = {name: [] for name in rows}
    for index in range(rounds + 1):
        for name, measure in rows.items():
            value = measure()
            print(f"round {index}/{rounds}  {name:<44} {value:>9,.1f}", flush=True)
            if index:
                values[name].append(value)
    return values


def publish(name: str, unit: str, values: dict[str, list[float]], ratios: dict[str, float]) -> None:
    """Prints the table and the JSON line, and writes the line to bench/results/."""
    facts = machine()
    print(
        f"\n{name} on {facts['cpu']} ({facts['cores']} cores), torch {facts['torch']}, "
        f"transformers {facts['transformers']}"
    )
    print(f"| row | median {unit} | lowest | highest |\n|---|---|---|---|")
    for row, measured in values.items():
        print(f"| {row} | {median(measured):,.1f} | {min(measured):,.1f} | {max(measured):,.1f} |")
    for ratio, value in ratios.items():
        print(f"{ratio}: {value:.2f}")
    rows = {
        row: {"median": median(one), "lowest": min(one), "highest": max(one), "runs": len(one)}
        for row, one in values.items()
    }
    record = {"bench": name, "unit": unit, "machine": facts, "rows": rows, "ratios": ratios}
    line = json.dumps(record, ensure_ascii=False)
    print(line)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(line + "\n")


def rounded(value: Any) -> Any:
    """Returns the value with every number in it rounded to four decimals."""
    match value:
        case float():
            return round(value, 4)
        case dict():
            return {name: rounded(part) for name, part in value.items()}
        case list():
            return [rounded(part) for part in value]
    return value


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    # git refuses a checkout that has another owner
    command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # a machine without git
        return ""
