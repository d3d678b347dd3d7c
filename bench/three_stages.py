"""Makes the tables and pictures of docs/three-stages.md from measured results.

    python -m bench.three_stages --sweeps DIR   first keeps what the page needs of DIR/*/report.json
    python -m bench.three_stages                writes tables and pictures from what was kept

DIR contains five sweeps: `curve` and `ablation` of the shipped pair; `trio-mi`,
`trio-task-arithmetic` and `trio-ties` of a newly trained base with its two endpoints. The page
lists the commands that made them. The kept results are `bench/results/three-stages.json` and, from
`bench.budgets`, `bench/results/budgets.json`. A picture contains the digest of the results it
shows.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.measuring.folders import RESULTS
from bench.measuring.publishing import machine, rounded

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "three-stages.md"
PICTURES = DOCS / "three-stages"
SWEEPS_KEPT = RESULTS / "three-stages.json"
BUDGETS_KEPT = RESULTS / "budgets.json"
SWEEPS = ("curve", "ablation", "trio-mi", "trio-task-arithmetic", "trio-ties")
METHODS = {
    "trio-mi": "MI, λ",
    "trio-task-arithmetic": "Task Arithmetic, scale",
    "trio-ties": "TIES, scale",
}
PAPERS_CHOICE = {"trio-mi": 0.8, "trio-task-arithmetic": 0.7, "trio-ties": 0.5}
KEPT = ("mean_at_k", "pass_at_k", "vote_at_k", "think_rate", "tokens_mean", "tokens_p50",
        "tokens_p90", "reasoning_tokens_p90", "malformed", "unfinished")  # fmt: skip
ABLATION = {
    "all": ("all layers", "80.5 | 17,574 | 99.95"),
    "2-5": ("last two thirds", "69.5 | 13,159 | 100"),
    "0-3": ("first two thirds", "59.1 | 18,044 | 48"),
    "2-3": ("middle third", "54.7 | 20,679 | 11"),
    "4-5": ("last third", "51.4 | 14,987 | 31"),
    "0-1": ("first third", "42.5 | 32,151 | 0"),
    "mlp": ("FFN only", "71.5 | – | 99.9"),
    "attn": ("attention only", "51.9 | – | 0.7"),
}
"""Descriptions of the dials of six layers, with the paper's Mean@64, tokens and think rate in %."""
POLICIES = {
    "routed": "routed",
    "routed, class": "routed, class given",
    "λ = 0.7": "λ = 0.7, cut",
    "λ = 1": "λ = 1, cut",
}
STYLE: dict[Any, Any] = {"svg.hashsalt": "mi-server", "svg.fonttype": "none", "font.size": 9}

Point = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", type=Path)
    folder = parser.parse_args().sweeps
    if folder is not None:
        keep(folder)
    PAGE.write_text(filled(PAGE.read_text()))
    PICTURES.mkdir(exist_ok=True)
    draw_curve(PICTURES / "curve.svg")
    draw_methods(PICTURES / "methods.svg")
    draw_budgets(PICTURES / "budgets.svg")


# --- What is kept ---------------------------------------------------------------------------------


def keep(folder: Path) -> None:
    kept = {
        "machine": machine(),
        "sweeps": {name: _kept(folder / name / "report.json") for name in SWEEPS},
    }
    SWEEPS_KEPT.write_text(json.dumps(rounded(kept), ensure_ascii=False) + "\n")


def _kept(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text())
    return {
        "parameters": report["parameters"],
        "stages": [curve["stages"] for curve in report["curves"]],
        "points": [_point(point) for point in report["points"]],
        "long": [_point(point) for point in report["classes"]["long"]["points"]],
    }


def _point(point: Point) -> dict[str, Any]:
    intervals = {name: point["intervals"][name] for name in KEPT}
    head = {name: point[name] for name in ("lambda", "dial", "questions", "samples")}
    return head | {name: point[name] for name in KEPT} | {"intervals": intervals}


def sweeps() -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(SWEEPS_KEPT.read_text())["sweeps"]
    return kept


def budgets() -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(BUDGETS_KEPT.read_text())
    return kept


def digest() -> str:
    """Returns the digest of everything that the pictures are drawn from."""
    both = SWEEPS_KEPT.read_bytes() + BUDGETS_KEPT.read_bytes()
    return hashlib.sha256(both).hexdigest()[:16]


# --- Tables ---------------------------------------------------------------------------------------


def filled(page: str) -> str:
    """Returns the page with new tables between its marks, `<!-- name -->` and `<!-- end -->`."""
    for name, table in tables().items():
        head, mark, rest = page.partition(f"<!-- {name} -->")
        _, end, rest = rest.partition("<!-- end -->")
        assert end, f"the page has no place for the table {name!r}"
        page = f"{head}{mark}\n{table}\n{end}{rest}"
    return page


def tables() -> dict[str, str]:
    measured = sweeps()
    return {
        "curve": curve_table(measured["curve"]),
        "methods": methods_table(measured),
        "scales": scales_table(measured),
        "ablation": ablation_table(measured["ablation"]["points"]),
        "forced": forced_table(budgets()["classes"]["default"]),
        **{f"budgets {name}": budgets_table(own) for name, own in budgets()["classes"].items()},
    }


def _table(head: str, rows: Iterable[str]) -> str:
    return "\n".join([f"| {head} |", "|---" * (head.count("|") + 1) + "|", *rows])


def curve_table(curve: Mapping[str, Any]) -> str:
    rows = [
        f"| {it['lambda']:g} | {_share(it, 'think_rate')} | {_share(it, 'mean_at_k')} "
        f"| {it['pass_at_k']:.3f} | {it['vote_at_k']:.3f} | {_tokens(it)} | {it['tokens_p50']} "
        f"| {it['tokens_p90']} |"
        for it in curve["points"]
    ]
    head = "λ | think rate | Mean@8 | Pass@8 | Vote@8 | tokens, mean | p50 | p90"
    return _table(head, rows)


def methods_table(measured: Mapping[str, Any]) -> str:
    """Returns the table of methods.

    It has, for each method, the paper's choice, the best point, and the cheapest points that reach
    two scores.
    """
    rows = []
    for name, method in METHODS.items():
        points = measured[name]["points"]
        (chosen,) = (it for it in points if it["lambda"] == PAPERS_CHOICE[name])
        shown = {"paper's choice": chosen, "best": best(points)}
        shown |= {f"cheapest with ≥ {least:g}": cheapest(points, least) for least in (0.9, 0.95)}
        rows += [_method_row(method, what, point) for what, point in shown.items()]
    return _table("method | point | at | Mean@8 | tokens, mean | think rate", rows)


def _method_row(method: str, what: str, point: Point | None) -> str:
    if point is None:
        return f"| {method} | {what} | none | – | – | – |"
    return (
        f"| {method} | {what} | {point['lambda']:g} | {_share(point, 'mean_at_k')} "
        f"| {_tokens(point)} | {_share(point, 'think_rate')} |"
    )


def best(points: Sequence[Point]) -> Point:
    """Returns the point with the highest score; of equal ones, the cheapest."""
    return max(points, key=lambda it: (it["mean_at_k"], -it["tokens_mean"]))


def cheapest(points: Sequence[Point], least: float) -> Point | None:
    good = [it for it in points if it["mean_at_k"] >= least]
    return min(good, key=lambda it: it["tokens_mean"], default=None)


def scales_table(measured: Mapping[str, Any]) -> str:
    by_scale = {name: {it["lambda"]: it for it in measured[name]["points"]} for name in METHODS}
    values = sorted({value for own in by_scale.values() for value in own})
    rows = [
        f"| {value:g} | " + " | ".join(_three(own.get(value)) for own in by_scale.values()) + " |"
        for value in values
    ]
    return _table("λ or scale | " + " | ".join(m.split(",")[0] for m in METHODS.values()), rows)


def _three(point: Point | None) -> str:
    if point is None:
        return "–"
    return f"{point['mean_at_k']:.3f} / {point['tokens_mean']:.1f} / {point['think_rate']:.3f}"


def ablation_table(points: Sequence[Point]) -> str:
    by_dial = {it["dial"]: it for it in points}
    rows = [
        f"| {what} | `{dial}` | {_share(by_dial[dial], 'mean_at_k')} | {_tokens(by_dial[dial])} "
        f"| {_share(by_dial[dial], 'think_rate')} | {papers} |"
        for dial, (what, papers) in ABLATION.items()
    ]
    head = "λ = 0.8 in | dial | Mean@8 | tokens | think rate | paper: Mean@64 | tokens | think, %"
    return _table(head, rows)


def budgets_table(rows: Sequence[Point]) -> str:
    by_policy = {(it["policy"], it["budget"]): it for it in rows}
    amounts = sorted({it["budget"] for it in rows if it["budget"] is not None})
    head = f"budget | λ routed | {' | '.join(POLICIES.values())} | routed − λ = 1 | 0.7 − λ = 1"
    table = _table(head, (_budget_row(by_policy, budget) for budget in amounts))
    low, high = (by_policy[name, None] for name in ("λ = 0", "λ = 1"))
    ends = (
        f"λ = 0 scores {_share(low, 'mean_at_k')} with {low['tokens_mean']:.1f} tokens, "
        f"and λ = 1 scores {_share(high, 'mean_at_k')} with {high['tokens_mean']:.1f}."
    )
    return f"{table}\n\nWithout a budget, {ends}"


def _budget_row(by_policy: Mapping[tuple[str, int | None], Point], budget: int) -> str:
    ran = ", ".join(by_policy["routed", budget]["lambdas"])
    spent = " | ".join(_spent(by_policy[name, budget]) for name in POLICIES)
    gains = " | ".join(_gain(by_policy[name, budget]) for name in ("routed", "λ = 0.7"))
    return f"| {budget} | {ran} | {spent} | {gains} |"


def _spent(row: Point) -> str:
    return f"{_share(row, 'mean_at_k')} at {row['tokens_mean']:.1f}"


def _gain(row: Point) -> str:
    gain = row["gain_over_cut"]
    return f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


def forced_table(rows: Sequence[Point]) -> str:
    """Returns the table of λ = 1 with a budget: blocks closed by force, and correct answers."""
    own = [it for it in rows if it["policy"] == "λ = 1" and it["budget"] is not None]
    head = "budget | closed by force | of these correct | of the others correct | malformed"
    return _table(
        head,
        (
            f"| {it['budget']} | {it['forced_close']:.3f} | {_or_dash(it['correct_if_forced'])} "
            f"| {_or_dash(it['correct_if_not'])} | {it['malformed']:.3f} |"
            for it in own
        ),
    )


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _share(point: Point, name: str) -> str:
    low, high = point["intervals"][name]
    return f"{point[name]:.3f} ({low:.3f}–{high:.3f})"


def _tokens(point: Point) -> str:
    low, high = point["intervals"]["tokens_mean"]
    return f"{point['tokens_mean']:.1f} ({low:.1f}–{high:.1f})"


# --- Pictures -------------------------------------------------------------------------------------


def _save(target: Path) -> None:
    plt.savefig(target, metadata={"Date": None, "Description": digest()})
    plt.close()


def draw_curve(target: Path) -> None:
    """Draws score and think rate over λ, and tokens over λ; the transition is shaded."""
    curve = sweeps()["curve"]
    with plt.rc_context(STYLE):
        _, (shares, lengths) = plt.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained")
        for points, color, what in (
            (curve["points"], "tab:blue", "all questions"),
            (curve["long"], "tab:orange", "three variables and more"),
        ):
            _over_lambda(shares, points, "mean_at_k", "-", color, f"Mean@8, {what}")
            _over_lambda(shares, points, "think_rate", "--", color, f"think rate, {what}")
            _over_lambda(lengths, points, "tokens_mean", "-", color, f"mean, {what}")
        _over_lambda(lengths, curve["points"], "tokens_p90", ":", "tab:blue", "p90, all questions")
        stages = curve["stages"][0]
        for axes, title in ((shares, "score and think rate"), (lengths, "generated tokens")):
            axes.axvspan(stages["instruct_until"], stages["thinking_from"], color="0.92", zorder=0)
            axes.set(xlabel="λ", title=title)
            axes.legend(fontsize=7)
        _save(target)


def _over_lambda(
    axes: Axes, points: Sequence[Point], name: str, style: str, color: str, label: str
) -> None:
    at = [it["lambda"] for it in points]
    axes.plot(at, [it[name] for it in points], style, color=color, marker=".", lw=1, label=label)
    low, high = zip(*(it["intervals"][name] for it in points), strict=True)
    axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)


def draw_methods(target: Path) -> None:
    """Draws score against tokens by method; a ring marks the paper's choice."""
    measured = sweeps()
    with plt.rc_context(STYLE):
        _, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
        for name, method in METHODS.items():
            points = measured[name]["points"]
            _with_errors(axes, points, method)
            (chosen,) = (it for it in points if it["lambda"] == PAPERS_CHOICE[name])
            axes.plot(chosen["tokens_mean"], chosen["mean_at_k"], "o", ms=11, mfc="none", mec="k")
        axes.set(xlabel="generated tokens, mean", ylabel="Mean@8")
        axes.legend(fontsize=8)
        _save(target)


def draw_budgets(target: Path) -> None:
    """Draws the score over the tokens spent, by policy, for all questions and for the long ones."""
    with plt.rc_context(STYLE):
        _, panels = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
        for axes, kind in zip(panels, ("default", "long"), strict=True):
            rows = budgets()["classes"][kind]
            for name, shown in POLICIES.items():
                own = [it for it in rows if it["policy"] == name and it["budget"] is not None]
                _with_errors(axes, own, shown, label="budget")
            (instruct,) = (it for it in rows if it["policy"] == "λ = 0")
            axes.axhline(instruct["mean_at_k"], color="0.5", lw=0.8, ls=":", label="λ = 0")
            axes.set(xlabel="generated tokens, mean", ylabel="Mean@8")
            axes.set_title("all questions" if kind == "default" else "three variables and more")
            axes.legend(fontsize=7)
        _save(target)


def _with_errors(axes: Axes, points: Sequence[Point], name: str, *, label: str = "lambda") -> None:
    x, y = [it["tokens_mean"] for it in points], [it["mean_at_k"] for it in points]
    sides = [
        (it["mean_at_k"] - it["intervals"]["mean_at_k"][0],
         it["intervals"]["mean_at_k"][1] - it["mean_at_k"])
        for it in points
    ]  # fmt: skip
    drawn = axes.errorbar(
        x, y, list(zip(*sides, strict=True)), marker=".", lw=1, elinewidth=0.6, label=name
    )
    for it, at in zip(points, zip(x, y, strict=True), strict=True):
        axes.annotate(
            f"{it[label]:g}", at, textcoords="offset points", xytext=(4, -8), fontsize=6,
            color=drawn.lines[0].get_color(),
        )  # fmt: skip


if __name__ == "__main__":
    main()
