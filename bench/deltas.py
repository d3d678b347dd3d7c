"""Measures what rounding the difference between the endpoints costs, on the embedded pair in fp32.

    python -m bench.deltas [--questions 100] [--samples 8] [--seed 1] [--kept]

Compares two full endpoints (`none`) with deltas in int8 and int4, in two ways:

    sweep    `mi-server sweep` at T = 0.7 with the same questions and seeds. Each point is compared
             with the exact one, and marked if it is outside the exact one's 95 % interval
    greedy   the greedy answers of the exact computation, scored again token by token: the share of
             tokens that are still the most likely one, and the error of the logits as a share of
             the distance between the endpoints' logits (median over tokens)

It measures quality, not time. Writes `bench/results/deltas.json` and the tables of docs/deltas.md.
With `--kept` it writes only the tables, from the results of an earlier run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bench.measuring.folders import RESULTS
from bench.measuring.publishing import machine, rounded
from mi_runtime.attention.reference import PackedAttention
from mi_runtime.config import DeltaDtype, EngineConfig
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.engine import Engine
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.load import load_pair
from mi_runtime.model.pair_check import check_pair
from mi_runtime.model.row_lambdas import StepRows
from mi_runtime.request import Dial, EngineRequest, SamplingParams, TokenEvent
from server.sweep.tasks import embedded_task
from server.text.checkpoint import EndpointText
from server.text.prompt import PromptBuilder
from server.wire.messages import Message

KEPT = RESULTS / "deltas.json"
PAGE = Path(__file__).parents[1] / "docs" / "deltas.md"
EXACT: DeltaDtype = "none"
KINDS: Sequence[DeltaDtype] = get_args(DeltaDtype)
LAMBDAS = [value / 10 for value in range(11)]
MEASURES = {"mean_at_k": "Mean@k", "think_rate": "think rate", "tokens_mean": "tokens"}
MAX_TOKENS = 256  # tokens of a greedy answer
TOGETHER = 32  # sequences in a forward

Points = dict[float, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--kept",
        action="store_true",
        help="measure nothing, only write the page from the kept results",
    )
    given = vars(parser.parse_args())
    if not given.pop("kept"):
        record = rounded(measured(given))
        RESULTS.mkdir(exist_ok=True)
        KEPT.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), kept()))
    print("\n\n".join(tables(kept()).values()))


def measured(given: Mapping[str, int]) -> dict[str, Any]:
    swept = {kind: sweep(kind, given) for kind in KINDS}
    return {
        "bench": "deltas",
        "machine": machine(),
        "parameters": dict(given),
        "weight_bytes": {kind: load(kind).weight_bytes for kind in KINDS},
        "sweep": {kind: compared(swept[kind], swept[EXACT]) for kind in KINDS},
        "greedy": greedy(given["questions"], given["seed"]),
    }


def kept() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(KEPT.read_text())
    return record


# --- The sweep ------------------------------------------------------------------------------------


def sweep(kind: DeltaDtype, given: Mapping[str, int]) -> Points:
    """Returns the points of a sweep by λ, as `mi-server sweep` reports them."""
    flags = [f"--{name}={value}" for name, value in given.items()]
    grid = f"--lambdas={','.join(map(str, LAMBDAS))}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "server.cli", "sweep", f"--out={folder}", grid, *flags]
        subprocess.run([*command, f"--delta-dtype={kind}"], check=True, stdout=subprocess.DEVNULL)
        report = json.loads(Path(folder, "report.json").read_text())
    return {point["lambda"]: point for point in report["points"]}


def compared(points: Points, exact: Points) -> list[dict[str, Any]]:
    return [_compared(points[value], exact[value]) for value in LAMBDAS]


def _compared(point: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    intervals = {name: exact["intervals"][name] for name in MEASURES}
    return {
        "lambda": point["lambda"],
        **{name: point[name] for name in MEASURES},
        "exact": {name: exact[name] for name in MEASURES},
        "exact_intervals": intervals,
        "within": {name: low <= point[name] <= high for name, (low, high) in intervals.items()},
    }


# --- Greedy answers and logits --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[int, ...]  # token ids of the prompt, and of the answer
    prompt: int  # how many of them are the prompt

    @property
    def kept(self) -> range:
        """The positions whose logits choose the answer's tokens."""
        return range(self.prompt - 1, len(self.tokens) - 1)


def greedy(questions: int, seed: int) -> dict[str, list[dict[str, float]]]:
    """Returns the comparison of the greedy answers by kind of delta, for each λ."""
    models = {kind: load(kind) for kind in KINDS}
    exact = models.pop(EXACT)
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in models}
    for value, answers in exact_answers(questions, seed).items():
        low, own, high = (logits(exact, answers, at) for at in (0.0, value, 1.0))
        for kind, model in models.items():
            served = logits(model, answers, value)
            error = (served - own).norm(dim=1) / (high - low).norm(dim=1)
            same = (served.argmax(1) == own.argmax(1)).double().mean()
            row = {"same_token": same.item(), "logit_error": error.median().item()}
            rows[kind].append({"lambda": value, "tokens": len(own), **row})
    return rows


def load(kind: DeltaDtype) -> BlendedModel:
    return load_pair(check_pair(INSTRUCT_DIRECTORY, THINKING_DIRECTORY), "cpu", "float32", kind)


def exact_answers(questions: int, seed: int) -> dict[float, list[Answer]]:
    """Returns the answers by λ, in the order of the questions."""
    texts = PromptBuilder(
        EndpointText.read(INSTRUCT_DIRECTORY), EndpointText.read(THINKING_DIRECTORY)
    )
    messages = [one.messages for one in embedded_task(questions, seed).questions]
    ends = frozenset(texts.vocabulary.encode("<|im_end|>"))
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, eos_token_ids=ends)
    engine = Engine(EngineConfig(str(INSTRUCT_DIRECTORY), str(THINKING_DIRECTORY)))
    answers = {}
    for dial in map(Dial, LAMBDAS):
        prompts = [texts.build([Message(**one) for one in own], dial) for own in messages]
        requests = [
            EngineRequest(str(number), prompt.token_ids, dial, sampling)
            for number, prompt in enumerate(prompts)
        ]
        answers[dial.reasoning_lambda] = _read(requests, engine.generate(requests))
    return answers


def _read(
    requests: Sequence[EngineRequest], events: Mapping[str, Sequence[TokenEvent]]
) -> list[Answer]:
    drawn = [[event.token_id for event in events[one.request_id]] for one in requests]
    return [
        Answer((*one.prompt, *(token for token in own if token is not None)), len(one.prompt))
        for one, own in zip(requests, drawn, strict=True)
    ]


def logits(model: BlendedModel, answers: Sequence[Answer], value: float) -> Tensor:
    """Returns the logits `[tokens of all answers, vocabulary]`, with all rows at λ."""
    pieces = [answers[first : first + TOGETHER] for first in range(0, len(answers), TOGETHER)]
    return torch.cat([_logits(model, piece, value) for piece in pieces])


def _logits(model: BlendedModel, answers: Sequence[Answer], value: float) -> Tensor:
    lengths = tuple(len(answer.tokens) for answer in answers)
    starts = accumulate(lengths, initial=0)
    kept = [
        start + at for start, answer in zip(starts, answers, strict=False) for at in answer.kept
    ]
    total = sum(lengths)
    model.groups.begin(StepRows((Dial(value),), (0,) * total, tuple(kept), blended=False))
    ids = torch.tensor([token for answer in answers for token in answer.tokens])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return model.logits(ids, positions, torch.tensor(kept), PackedAttention(lengths))


# --- The page -------------------------------------------------------------------------------------


def filled(page: str, record: Mapping[str, Any]) -> str:
    """Returns the page with new tables between its marks, `<!-- name -->` and `<!-- end -->`."""
    for name, table in tables(record).items():
        head, mark, rest = page.partition(f"<!-- {name} -->")
        _, end, rest = rest.partition("<!-- end -->")
        assert end, f"the page has no place for the table {name!r}"
        page = f"{head}{mark}\n{table}\n{end}{rest}"
    return page


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        "sweep": "\n".join(_sweep_table(record)),
        "greedy": "\n".join(_greedy_table(record)),
    }


def _sweep_table(record: Mapping[str, Any]) -> Iterator[str]:
    """Returns the table of the sweep; a value outside the exact one's interval is bold."""
    yield f"| λ | {' | '.join(f'{name}: exact | int8 | int4' for name in MEASURES.values())} |"
    yield "|---" * (1 + 3 * len(MEASURES)) + "|"
    for at, value in enumerate(LAMBDAS):
        exact, *others = (record["sweep"][kind][at] for kind in KINDS)
        cells = []
        for name in MEASURES:
            low, high = (_number(name, bound) for bound in exact["exact_intervals"][name])
            cells.append(f"{_number(name, exact[name])} ({low}–{high})")
            cells += [_marked(_number(name, row[name]), row["within"][name]) for row in others]
        yield f"| {value:g} | {' | '.join(cells)} |"


def _number(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "tokens_mean" else f"{value:.3f}"


def _marked(text: str, is_within: bool) -> str:
    return text if is_within else f"**{text}**"


def _greedy_table(record: Mapping[str, Any]) -> Iterator[str]:
    kinds = [kind for kind in KINDS if kind != EXACT]
    yield f"| λ | {' | '.join(f'{kind}: logits | same token' for kind in kinds)} |"
    yield "|---" * (1 + 2 * len(kinds)) + "|"
    for at, value in enumerate(LAMBDAS):
        rows = [record["greedy"][kind][at] for kind in kinds]
        cells = [f"{row['logit_error']:.4f} | {row['same_token']:.4f}" for row in rows]
        yield f"| {value:g} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
