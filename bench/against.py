"""Runs one benchmark in two checkouts in turn, to show whether a commit made it slower.

    git worktree add ../before HEAD~1
    python -m bench.against ../before bench.serving --rounds 4 -- --rounds 1

Each round runs the module once in each checkout. The order changes from round to round, so that a
machine that gets slower affects both. Prints the ratio of this checkout's median to the other's for
every row. The benchmark's own flags follow `--`.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

HERE = Path(__file__).parents[1]

Figures = dict[str, float]
"""Medians of one run, by benchmark and row."""


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python -m bench.against OTHER MODULE [--rounds N] [-- FLAGS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("other", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("module", help="a benchmark that publishes rows, such as bench.serving")
    parser.add_argument("--rounds", type=int, default=3)
    words = [*sys.argv[1:], "--"]
    end = words.index("--")
    arguments = parser.parse_args(words[:end])
    command = [sys.executable, "-m", arguments.module, *words[end + 1 : -1]]
    runs: dict[Path, list[Figures]] = {HERE: [], arguments.other.resolve(): []}
    for number in range(arguments.rounds):
        for checkout in sorted(runs, reverse=bool(number % 2)):
            runs[checkout].append(run(command, checkout))
            print(f"round {number + 1}/{arguments.rounds} in {checkout.name}", flush=True)
    print_ratios(*runs.values())


def run(command: list[str], checkout: Path) -> Figures:
    """Runs the benchmark in a checkout. Raises CalledProcessError if it fails."""
    done = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"bench"')]
    return {
        f"{record['bench']}: {row}": figures["median"]
        for record in records
        for row, figures in record["rows"].items()
    }


def print_ratios(here: list[Figures], other: list[Figures]) -> None:
    print("| row | here | other | here / other | lowest | highest |\n|---|---|---|---|---|---|")
    columns: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for ours, theirs in zip(here, other, strict=True):
        for row in ours.keys() & theirs.keys():
            columns[row].append((ours[row], theirs[row]))
    for row, pairs in sorted(columns.items()):
        a, b = (median(values) for values in zip(*pairs, strict=True))
        print(f"| {row} | {a:,.4g} | {b:,.4g} | {ratio_cells(pairs)} |")


def ratio_cells(pairs: list[tuple[float, float]]) -> str:
    """Returns median, lowest and highest ratio, or dashes if a number is 0 or negative."""
    if any(number <= 0 for pair in pairs for number in pair):
        return "– | – | –"
    ratios = [ours / theirs for ours, theirs in pairs]
    return f"{median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f}"


if __name__ == "__main__":
    main()
