"""Draws the pictures of the built-in profiles for docs/routing.md.

    python -m bench.curves [--out docs/curves]

There is one SVG for each profile, with one panel for each routing class: score against mean
reasoning tokens, each point labelled with its λ. Filled points are on the front, and the line
follows the front; it is solid where the router may choose a λ between two points, and dotted where
it may not. Each picture contains the digest of its profile, so that a test can find a picture that
is older than its profile.
"""

import argparse
import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from server.routing.profiles import BUILTIN, RoutingClass, load_profile
from server.routing.routing_table import Candidate, RoutingTable

STEP = 0.01  # the default grid
LEAST_SPAN = 0.1  # of score, so that noise does not look like a curve
STYLE: dict[Any, Any] = {"svg.hashsalt": "mi-server", "svg.fonttype": "none", "font.size": 9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/curves"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(BUILTIN.glob("*.json")):
        draw(path, out / f"{path.stem}.svg")


def draw(path: Path, target: Path) -> None:
    profile = load_profile(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    with plt.rc_context(STYLE):
        columns = min(2, len(profile.classes))
        rows = -(-len(profile.classes) // columns)
        figure, panels = plt.subplots(
            rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False, layout="constrained"
        )
        for axes in panels.flat:
            axes.set_visible(False)
        for axes, (name, measured) in zip(panels.flat, profile.classes.items(), strict=False):
            axes.set_visible(True)
            _panel(axes, f"{profile.name}: {name}", measured)
        figure.savefig(target, metadata={"Date": None, "Description": digest})
        plt.close(figure)


def _panel(axes: Axes, title: str, measured: RoutingClass) -> None:
    table = RoutingTable(measured, step=STEP)
    for low, high in pairwise(table.front):
        style = "-" if _is_line(table, low, high) else ":"
        axes.plot([low.mean, high.mean], [low.score, high.score], style, color="tab:blue", lw=1)
    front = {candidate.reasoning_lambda for candidate in table.front}
    for point in measured.points:
        x, y, value = point.reasoning_tokens.mean, point.score, point.reasoning_lambda
        face, edge = ("tab:blue", "tab:blue") if value in front else ("white", "tab:gray")
        axes.plot(x, y, "o", ms=5, mfc=face, mec=edge, zorder=4 if value in front else 3)
        axes.annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(5, -9), fontsize=7)
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, top - LEAST_SPAN), top)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("reasoning tokens, mean")
    axes.set_ylabel("score")


def _is_line(table: RoutingTable, low: Candidate, high: Candidate) -> bool:
    """Whether the router may choose a λ between the two."""
    at = table.candidates.index(low)
    return table.candidates[at + 1] != high


if __name__ == "__main__":
    main()
