"""What the GPU bench keeps: a JSON that is whole after every row, and the ratios aimed at."""

import json
from pathlib import Path
from typing import Any

from bench.gpu_bounds import Card, Work
from bench.gpu_rows import Scale

Record = dict[str, Any]  # a row as it is written
Reference = tuple[int, int, int]  # sequences of the most important rows, their context, a prompt


class Report:
    """Rows as they come; those after the card's have their bounds."""

    def __init__(self, name: str, folder: Path) -> None:
        self._path = folder / f"{name}.json"
        self.record: Record = {"bench": name, "machine": None, "card": None, "rows": []}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Record) -> None:
        for fact in ("machine", "card"):
            self.record[fact] = row.pop(fact, None) or self.record[fact]
        self.record["rows"].append(row | self._bound(row))
        self._write()
        print(line_of(self.record["rows"][-1]), flush=True)

    def finish(self, reference: Reference, seconds: float) -> None:
        self.record |= {"ratios": ratios(self.record["rows"], reference), "seconds": seconds}
        self._write()
        for name, value in self.record["ratios"].items():
            print(f"{name}: {value:.3f}")
        print(f"{seconds:.0f} s; {self._path}")

    def _bound(self, row: Record) -> Record:
        if self.record["card"] is None or "work" not in row:
            return {}
        seconds, by = Card(**self.record["card"]).bound(Work(**row["work"]))
        return {"bound_seconds": seconds, "bound_by": by, "share": seconds / row["seconds"]}

    def _write(self) -> None:
        """Whole or not at all: a run may be ended at any moment."""
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.record, ensure_ascii=False) + "\n")
        unfinished.replace(self._path)


def line_of(row: Record) -> str:
    name = f"{row['subject']:<9} {row['what']}"
    if row["sequences"]:
        name += f", {row['lambdas']} λ, {row['sequences']} × {row['tokens']}"
    for instead in ("skipped", "error"):
        if instead in row:
            return f"{name}: {instead}: {row[instead]}"
    if "seconds" not in row:
        return name
    line = f"{name}: {row['seconds'] * 1e3:,.3f} ms, {row['tokens_a_second']:,.0f} tokens/s"
    if "share" in row:
        line += f", {row['share']:.0%} of its bound ({row['bound_by']})"
    return line


def reference_of(scale: Scale) -> Reference:
    return scale.batches[0], scale.contexts[0], scale.prompts[0]


def ratios(rows: list[Record], reference: Reference) -> dict[str, float]:
    """Those whose rows there are, at the sizes of `reference`."""
    sequences, context, prompt = reference
    found = {
        (row["subject"], row["what"], row["lambdas"], row["sequences"], row["tokens"]): row
        for row in rows
        if "seconds" in row
    }

    def decode(subject: str, lambdas: str) -> Record:
        return found[subject, "decode", lambdas, sequences, context]

    def answers(subject: str) -> Record:
        (row,) = (row for key, row in found.items() if key[:3] == (subject, "answers", "one"))
        return row

    def first_token() -> float:
        row = found["pair", "first token", "never seen", 1, prompt]
        hot = sorted(row["facts"]["hot_seconds"])
        return float(row["seconds"] / hot[len(hot) // 2])

    static = "static"
    wanted = {
        "static: share of its bound": lambda: decode(static, "one")["share"],
        "mixed λ: share of its bound": lambda: decode("pair", "different")["share"],
        "mixed λ / static, seconds a step": lambda: (
            decode("pair", "different")["seconds"] / decode(static, "one")["seconds"]
        ),
        "int8 delta / static, seconds a step": lambda: (
            decode("int8", "different")["seconds"] / decode(static, "one")["seconds"]
        ),
        "int4 delta / static, seconds a step": lambda: (
            decode("int4", "different")["seconds"] / decode(static, "one")["seconds"]
        ),
        "hot λ / static, tokens a second": lambda: (
            decode(static, "one")["seconds"] / decode("pair", "one")["seconds"]
        ),
        "never-seen λ / hot λ, first token": first_token,
        "hot λ / continuous batching of transformers, tokens a second": lambda: (
            answers("pair")["tokens_a_second"] / answers("batching")["tokens_a_second"]
        ),
    }
    known = {}
    for name, ratio in wanted.items():
        try:
            known[name] = ratio()
        except (KeyError, ValueError):  # a row failed, or was not asked for
            continue
    return known
