"""Parses the command lines of `mi-server sweep` and `mi-server calibrate`."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from server.sweep.errors import BadParameters
from server.sweep.graders import GRADERS
from server.sweep.grid import ALL, Decoding
from server.sweep.tasks import EMBEDDED

GRID: Final = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"
PAIR_FLAGS: Final = ("instruct", "thinking", "device", "dtype", "delta-dtype")
"""Flags of `mi-server serve` that the commands accept themselves; others follow after `--`."""

_KEY: Final = "--api-key"


def sweep_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "sweep",
        "Asks many questions at every λ and reports how λ changes scores, lengths and think rate, "
        "and where the three stages are. Writes report.json, report.html, points.csv and "
        "samples.jsonl.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="report folder; rerun the same command to resume")
    add("--lambdas", type=_numbers(0, 1), default=GRID, help="λ values (default: %(default)s)")
    add("--samples", type=_count(1), default=8, help="samples per question (default: 8)")
    add(
        "--temperature",
        type=_numbers(0, 2),
        default="0.7",
        help="sampling temperature, one value or several (default: 0.7)",
    )
    add(
        "--top-p",
        type=_numbers(1e-6, 1),
        default="1",
        help="nucleus sampling: total probability of the tokens to sample from, one value or "
        "several; 1: off (default)",
    )
    add(
        "--top-k",
        type=_count(0),
        default=0,
        help="number of most probable tokens to sample from; 0: off (default)",
    )
    add("--instruct-decoding", type=_decoding, metavar="T,TOP_P,TOP_K",
        help="sampling settings at λ = 0, such as 0.7,0.8,20 (default: as at other λ)")  # fmt: skip
    add("--dials", type=_names, default=[ALL], metavar="NAMES",
        help="blend groups that λ applies to, with the others at 0: all, mlp, attn, 0-3, 0-3.mlp; "
        "several make an ablation (default: all)")  # fmt: skip
    add("--ablate", action="store_true", help="use the dials of the paper's ablation")
    return parser


def calibrate_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "calibrate",
        "Measures the profile from which `serve` picks λ: a grid of λ first, then more λ values "
        "and samples where the curve bends.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True,
        help="profile to write, a JSON file; samples and report go to OUT.work")  # fmt: skip
    add("--name", help="name of the profile (default: the model's)")
    add("--lambdas", type=_numbers(0, 1), default=GRID, help="first grid (default: %(default)s)")
    add("--samples", type=_count(2), default=4, help="samples per question and λ (default: 4)")
    add("--target-interval", type=_number(1e-3, 1), default=0.05,
        help="width of the 95 %% interval to reach at every λ (default: 0.05)")  # fmt: skip
    add("--least-gap", type=_number(0.01, 1), default=0.02,
        help="minimum distance between two λ values, at least the server's --lambda-step "
        "(default: 0.02)")  # fmt: skip
    add("--budget-samples", type=_count(1),
        help="maximum number of samples in total (default: 3 times the first grid)")  # fmt: skip
    add(
        "--temperature",
        type=_number(0, 2),
        default=0.7,
        help="sampling temperature; 0 is greedy (default: 0.7)",
    )
    add(
        "--top-p",
        type=_number(1e-6, 1),
        default=1.0,
        help="nucleus sampling: total probability of the tokens to sample from; 1: off (default)",
    )
    add(
        "--top-k",
        type=_count(0),
        default=0,
        help="number of most probable tokens to sample from; 0: off (default)",
    )
    add("--instruct-decoding", type=_decoding, metavar="T,TOP_P,TOP_K",
        help="sampling settings at λ = 0, such as 0.7,0.8,20 (default: as at other λ)")  # fmt: skip
    add("--think-threshold", type=_number(0, 1), default=0.0,
        help="highest λ that takes Instruct's chat template; a server at --url must run with the "
        "same value (default: 0)")  # fmt: skip
    return parser


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"mi-server {name}",
        description=description,
        epilog="Flags of `mi-server serve` may follow after `--`, for the server that it starts.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", default=EMBEDDED, help="`embedded` (default) or a JSONL file of questions")
    add("--grader", choices=GRADERS, help="how answers are graded; required if --task is a file")
    add("--pattern", help="regular expression of --grader regex; its first group is the answer")
    add(
        "--questions",
        type=_count(1),
        help="number of questions (default: 150 of embedded, all of a file)",
    )
    add(
        "--max-tokens",
        type=_count(1),
        help="maximum number of tokens of an answer (default: as many as the context holds)",
    )
    add("--seed", type=int, default=0, help="seed of questions, samples and intervals (default: 0)")
    add("--url", help="a running mi-server; without it the command starts one")
    add("--api-key", help="key to send with every request")
    add("--model", help="name of the pair at --url (default: the one it serves)")
    add("--concurrency", type=_count(1), default=128, help="requests in flight (default: 128)")
    add(
        "--timeout",
        type=_number(1),
        default=3600.0,
        help="request timeout in seconds (default: 3600)",
    )
    for flag in PAIR_FLAGS:
        add(f"--{flag}", help="as in `mi-server serve`")
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> argparse.Namespace:
    """Returns the flags, with those for the server in `serve`. Raises `BadParameters`."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    flags = parser.parse_args(words[:at])
    given = {name: getattr(flags, name.replace("-", "_")) for name in PAIR_FLAGS}
    own = [f"--{name}={value}" for name, value in given.items() if value is not None]
    flags.serve = [*own, *words[at + 1 :]]
    _check_together(flags)
    if flags.task == EMBEDDED:
        flags.grader = flags.grader or EMBEDDED
    elif flags.grader is None:
        raise BadParameters(f"--task {flags.task} requires --grader: one of {', '.join(GRADERS)}")
    return flags


def _check_together(flags: argparse.Namespace) -> None:
    if flags.url and flags.serve:
        raise BadParameters(
            f"{flags.serve[0]} cannot be combined with --url: it configures a server that this "
            "command starts"
        )
    for word in flags.serve:
        if word.partition("=")[0] in ("--host", "--port", "--drain-timeout", "--log-format"):
            raise BadParameters(f"{word.partition('=')[0]} is set by this command")
    if getattr(flags, "ablate", False) and flags.dials != [ALL]:
        raise BadParameters("--ablate and --dials cannot be combined")


def without_api_keys(words: Sequence[str]) -> list[str]:
    """Returns the words of a command with `…` in place of API keys, to be written to files."""
    redacted = [re.sub(rf"^({_KEY})=.*", r"\1=…", word, flags=re.DOTALL) for word in words]
    return ["…" if before == _KEY else word for before, word in pairwise(["", *redacted])]


def _number(least: float, most: float = math.inf) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        return _checked(value, least, most)

    return number


def _numbers(least: float, most: float) -> Callable[[str], list[float]]:
    def numbers(text: str) -> list[float]:
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a list of numbers separated by commas"
            ) from None
        return [_checked(value, least, most) for value in dict.fromkeys(values)]

    return numbers


def _checked(value: float, least: float, most: float) -> float:
    if not least <= value <= most or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{value:g} is not between {least:g} and {most:g}")
    return value


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return count


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _decoding(text: str) -> Decoding:
    if text.count(",") != 2:
        raise argparse.ArgumentTypeError("must be T,TOP_P,TOP_K, for example 0.7,0.8,20")
    temperature, top_p, top_k = text.split(",")
    return Decoding(_number(0, 2)(temperature), _number(1e-6, 1)(top_p), _count(0)(top_k))
