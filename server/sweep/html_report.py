"""Writes the report as one HTML page, with tables and plots (SVG), which loads nothing else."""

import html
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from server.routing.profiles import DEFAULT_CLASS
from server.sweep.curves import ClassReport, Curve, MeasuredPoint
from server.sweep.report import COLUMNS, replace_file
from server.sweep.stages import NO_TRANSITION, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
        overflow-x: auto; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
tr.front td:first-child { font-weight: bold; }
svg { max-width: 100%; height: auto; }
small { color: #666; }
"""


def write_html(path: Path, reports: Sequence[ClassReport], parameters: Mapping[str, Any]) -> None:
    """Writes the page to `path`, which changes only when the page is complete."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>λ sweep of {_text(parameters['model'])}</title><style>{_STYLE}</style>",
        f"<h1>λ sweep of {_text(parameters['model'])}</h1>",
        *(_section(report) for report in reports),
        f"<h2>How it was measured</h2><p>{_text(RULE)}. The small print next to a number is its "
        "95 % bootstrap interval over questions; bold λ are on the Pareto front of mean tokens and "
        f"Mean@k.</p>{_parameters(parameters)}</html>",
    ]
    replace_file(path, "\n".join(parts) + "\n")


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(report: ClassReport) -> str:
    title = "All questions" if report.name == DEFAULT_CLASS else f"Class {report.name}"
    tables = "".join(_curve(curve) for curve in report.curves)
    return f"<h2>{_text(title)}</h2>{_plots(report)}{tables}"


def _curve(curve: Curve) -> str:
    head = "".join(f"<th>{name}" for name in ("λ", "k", *(name for name, _, _ in COLUMNS)))
    best = curve.front
    rows = "".join(_row(point, on_front=point in best) for point in curve.points)
    points = curve.points
    return (
        f"<h3>{_text(curve.name)}</h3><p>{points[0].questions} questions; "
        f"{_text(curve.stages or NO_TRANSITION)}</p><table><tr>{head}</tr>{rows}</table>"
    )


def _row(point: MeasuredPoint, *, on_front: bool) -> str:
    cells = "".join(_cell(point, name, form) for _, name, form in COLUMNS)
    mark = " class='front'" if on_front else ""
    return f"<tr{mark}><td>{point.reasoning_lambda:g}<td>{point.k}{cells}</tr>"


def _cell(point: MeasuredPoint, name: str, form: str) -> str:
    if name not in point.numbers:
        return "<td>–"
    it = point.numbers[name]
    low, high = form.format(it.low), form.format(it.high)
    return f"<td>{form.format(it.value)} <small>{low}–{high}</small>"


def _parameters(parameters: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{_text(name)}<td>{_text(it)}" for name, it in parameters.items())
    return f"<table>{rows}</table>"


def _plots(report: ClassReport) -> str:
    """Draws three plots in a row: think rate and score, tokens, and the score over tokens."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4), layout="constrained")
    shares, lengths, costs = figure.subplots(1, 3)
    for number, curve in enumerate(report.curves):
        color = f"C{number % 10}"
        _draw_shares(shares, curve, color)
        _draw_lengths(lengths, curve, color)
        _draw_costs(costs, curve, color)
    _shade_stages(shares, report.curves)
    shares.set(xlabel="λ", ylim=(-0.03, 1.03), title="Mean@k (—) and think rate (- -)")
    lengths.set(xlabel="λ", ylabel="tokens", title="tokens: mean (—), reasoning p90 (···)")
    costs.set(xlabel="mean tokens", ylabel="Mean@k", title="score over tokens; line: Pareto front")
    if len(report.curves) > 1:
        shares.legend(fontsize="x-small")
    text = StringIO()
    with mpl.rc_context({"svg.hashsalt": report.name, "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _draw_shares(axes: "Axes", curve: Curve, color: str) -> None:
    at = [point.reasoning_lambda for point in curve.points]
    for name, style in (("mean_at_k", "-"), ("think_rate", "--")):
        label = curve.name if style == "-" else None
        values = [point.value(name) for point in curve.points]
        axes.plot(at, values, style, color=color, marker=".", label=label)
        low = [point.numbers[name].low for point in curve.points]
        high = [point.numbers[name].high for point in curve.points]
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)


def _draw_lengths(axes: "Axes", curve: Curve, color: str) -> None:
    at = [point.reasoning_lambda for point in curve.points]
    for name, style in (("tokens_mean", "-"), ("reasoning_tokens_p90", ":")):
        axes.plot(at, [point.value(name) for point in curve.points], style, color=color, marker=".")


def _draw_costs(axes: "Axes", curve: Curve, color: str) -> None:
    tokens = [point.value("tokens_mean") for point in curve.points]
    axes.scatter(tokens, [point.value("mean_at_k") for point in curve.points], color=color, s=14)
    front = curve.front
    axes.plot(
        [point.value("tokens_mean") for point in front],
        [point.value("mean_at_k") for point in front],
        color=color,
    )
    for point in front:
        where = (point.value("tokens_mean"), point.value("mean_at_k"))
        axes.annotate(f"{point.reasoning_lambda:g}", where, fontsize="x-small")


def _shade_stages(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Shades the transition, if there is a single curve."""
    found = curves[0].stages
    if found is not None and len(curves) == 1:
        axes.axvspan(found.instruct_until, found.thinking_from, color="0.9", zorder=0)
