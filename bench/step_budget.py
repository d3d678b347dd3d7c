"""Computes how long a decode step should take on a GPU, for the tables of docs/performance.md.

    python -m bench.step_budget            prints them
    python -m bench.step_budget --write    writes them into the page

Bytes and bounds follow from the shapes (`bench.gpu.bounds`). Launches are counted: the real model
code, with tiny width and a few layers, runs a decode step on the CPU in the form that is captured
on a GPU, and every dispatch except views and empty tensors counts as one launch. Triton kernels,
which a CPU cannot run, are replaced by as many dispatches as they need launches. Nothing is timed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from bench.gpu.bounds import decode_work, way_of
from bench.host import GREEDY, SAMPLED, Case, dispatches
from bench.measuring.dispatches import EachDispatch
from bench.models.random_pair import Place, random_endpoint, random_pair
from bench.models.shapes import SHAPES, TINY, Shape, Store
from bench.models.static_engine import static_model
from mi_runtime.attention.paged import PagedAttention
from mi_runtime.attention.plan import AttentionPlan
from mi_runtime.execution.decode_graphs import DecodeGraphs, GraphKey
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.row_lambdas import Way

PAGE: Final = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- bench.step_budget: from here -->\n", "<!-- bench.step_budget: to here -->\n"
SHAPE: Final = SHAPES["4b"]
ROWS: Final = (1, 32, 128)
CONTEXT: Final = 1024  # tokens
BANDWIDTHS: Final = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second, as copied
NODE: Final = (1.5e-6, 2.3e-6)  # seconds of a node of a CUDA graph on Hopper
LAUNCH: Final = 4e-6  # seconds of the host for each launch or copy, by published measurements
NO_LAUNCH: Final = ("empty", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view")


@dataclass(frozen=True, slots=True)
class Subject:
    name: str
    store: Store
    way: Way
    one_lambda: bool


SUBJECTS: Final = (
    Subject("static", "static", Way.PAIR, True),
    Subject("λ = 0", "pair", Way.ENDPOINT, True),
    Subject("hot λ", "pair", Way.BLENDED, True),
    Subject("32 λ", "pair", Way.PAIR, False),
    Subject("32 λ, int8", "int8", Way.PAIR, False),
    Subject("32 λ, int4", "int4", Way.PAIR, False),
)


# --- Counting launches ---------------------------------------------------------------------------


class Launches(EachDispatch):  # type: ignore[no-untyped-call]
    """Counts the dispatches that would be kernels on a GPU, and all dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = 0
        self.dispatched = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        self.dispatched += 1
        self.kernels += not func.is_view and not name.startswith(NO_LAUNCH)
        return func(*args, **kwargs)


class StandInAttention:
    """Makes the launches of the Triton backend: to write, to attend, and to add up parts."""

    name = "stand-in"

    def write(
        self, plan: AttentionPlan, keys: Tensor, values: Tensor, key: Tensor, value: Tensor
    ) -> None:
        values[:1].zero_()

    def attend(
        self, plan: AttentionPlan, query: Tensor, keys: Tensor, values: Tensor, **_: Any
    ) -> Tensor:
        return query.new_zeros(*query.shape[:2], values.shape[-1]).zero_()


def _product(x: Tensor, instruct: Tensor, *_: Tensor) -> Tensor:
    """Replaces the kernels of the pair product."""
    return x.new_zeros(len(x), len(instruct))


def _captured(model: BlendedModel, way: Way) -> Launches:
    """Runs a decode step of two rows in the form that is captured."""
    model.kernels._kernels = SimpleNamespace(pair_linear=_product, delta_linear=_product)  # type: ignore[assignment]
    model.kernels.rows = 512
    model.groups.cache.places = int(way is Way.BLENDED)
    attention = PagedAttention(model.layers, 4, 16, model.dtype, model.device, StandInAttention())
    counted = Launches()

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        run()
        with counted:
            run()
        return run

    DecodeGraphs(model, attention, capture, sizes=(2,), max_blocks=2).capture([GraphKey(2, way)])
    return counted


@cache
def _model(store: Store, layers: int) -> BlendedModel:
    shape = replace(TINY["4b"], layers=layers)
    place = Place(torch.device("cpu"), torch.bfloat16, 64)
    if store == "static":
        return static_model(random_endpoint(shape, place))
    return random_pair(shape, place, store)


@dataclass(frozen=True, slots=True)
class Counts:
    """The kernels of a forward if it is captured, and its dispatches if it is not."""

    a_layer: int
    kernels: int
    dispatched: int


@cache
def counts_of(subject: Subject, layers: int = SHAPE.layers) -> Counts:
    one, two = (_captured(_model(subject.store, count), subject.way) for count in (1, 2))
    kernels, dispatched = two.kernels - one.kernels, two.dispatched - one.dispatched
    more = layers - 1
    return Counts(kernels, one.kernels + more * kernels, one.dispatched + more * dispatched)


# --- Tables --------------------------------------------------------------------------------------


def tables(shape: Shape = SHAPE) -> str:
    return f"{_steps(shape)}\n{_forwards(shape)}\n{_host()}"


def _steps(shape: Shape) -> str:
    head = (
        "| rows | weights | GB | bound, H100 | H200 | launch overhead | expected, H100 | H200 "
        "| measured |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(_step(shape, rows, one) for rows in ROWS for one in SUBJECTS)


def _step(shape: Shape, rows: int, subject: Subject) -> str:
    """Returns a row of the table.

    A step of one row has one λ, which runs by the pair product until its blended weights are built.
    """
    work = decode_work(shape, way_of(subject.store, subject.one_lambda), rows, CONTEXT)
    nodes = counts_of(subject).kernels
    overhead = [1e3 * nodes * one for one in NODE]
    bounds = [1e3 * work.bytes / one for one in BANDWIDTHS.values()]
    expected = [f"{bound + overhead[0]:.1f}–{bound + overhead[1]:.1f}" for bound in bounds]
    name = subject.name.replace("32 λ", "new λ" if rows == 1 else f"{rows} λ")
    cells = [str(rows), name, f"{work.bytes / 1e9:.1f}", *(f"{one:.1f}" for one in bounds)]
    return _row(*cells, f"{overhead[0]:.1f}–{overhead[1]:.1f}", *expected, "")


def _forwards(shape: Shape) -> str:
    head = "| weights | kernels a layer | of a step, captured | dispatches otherwise, about |\n"
    rows = [(one.name, counts_of(one)) for one in SUBJECTS]
    return f"{head}|---|---|---|---|\n" + "".join(
        _row(name, f"{one.a_layer}", f"{one.kernels:,}", f"{round(one.dispatched, -2):,}")
        for name, one in rows
    )


def _host() -> str:
    """Returns the table of what a step of two rows dispatches outside its forward."""
    head = "| answers | launches | copies to the device | back | host, at least |\n"
    rows = ["|---|---|---|---|---|\n"]
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        found = dispatches(Case(2, sampling, 2))
        calls = [found[part] for part in ("launched", "sent", "fetched")]
        cost = sum(calls) * LAUNCH
        rows.append(_row(name, *(f"{one:.0f}" for one in calls), f"{1e3 * cost:.2f} ms"))
    return head + "".join(rows)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def filled(page: str) -> str:
    """Returns the page with new tables; measured figures, which are written by hand, are kept."""
    before, rest = page.split(BEGIN)
    old, after = rest.split(END)
    return before + BEGIN + with_measured(tables(), old) + END + after


def with_measured(new: str, old: str) -> str:
    """Copies the measured times from the old tables into the new ones."""
    kept = {_key(line): line.split("|")[-2].strip() for line in old.splitlines() if _key(line)}
    lines = [
        f"{line[:-2]}{figure} |"
        if (figure := kept.get(_key(line))) and line.endswith("|  |")
        else line
        for line in new.splitlines()
    ]
    return "\n".join(lines) + "\n"


def _key(line: str) -> tuple[str, ...]:
    """Returns the rows and the weights that a line of the first table names, or an empty tuple."""
    cells = [cell.strip() for cell in line.split("|")]
    return tuple(cells[1:3]) if len(cells) == 11 else ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
