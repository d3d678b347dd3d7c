"""Makes the grid of a measurement: its settings, and its planned samples in the order of requests.

A setting is one point of a curve: λ, the blend groups it applies to, and how tokens are drawn. A
planned sample is one answer: a setting, a question, and the number of the sample. Consecutive
planned samples differ in their settings, so that every batch has all λ values. The samples of one
question follow each other closely, while its prompt is still cached.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, Final

from server.sweep.errors import BadParameters
from server.sweep.tasks import Question

ALL: Final = "all"
_GROUPS: Final = re.compile(r"(\d{1,4})-(\d{1,4})(?:\.(attn|mlp))?|(attn|mlp)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are drawn; a top_k of 0 is off."""

    temperature: float
    top_p: float
    top_k: int = 0

    def __str__(self) -> str:
        return f"T={self.temperature:g} top_p={self.top_p:g} top_k={self.top_k}"


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of a curve."""

    reasoning_lambda: float
    groups: str  # those that λ applies to, the others are at 0: `all`, `mlp`, `0-11`, `0-11.attn` …
    decoding: Decoding

    @property
    def label(self) -> str:
        """Identifies the setting in the file of samples."""
        return f"λ={self.reasoning_lambda:g} {self.groups} {self.decoding}"


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One answer to request."""

    setting: Setting
    question: Question
    sample: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.setting.label, self.question.id, self.sample

    def seed(self, base: int) -> int:
        """Returns a seed that depends on the question, λ and the sample's number.

        Settings that differ only in groups or decoding share it: they draw the same random numbers.
        """
        parts = (base, self.question.id, f"{self.setting.reasoning_lambda:g}", self.sample)
        return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def curves_of(
    lambdas: Sequence[float],
    groups: Sequence[str],
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    top_k: int = 0,
    instruct: Decoding | None = None,
) -> list[list[Setting]]:
    """Returns one curve for each choice of groups, temperature and top_p, each in order of λ.

    With `instruct`, every curve uses that decoding at λ = 0.
    """
    return [
        [
            Setting(
                value,
                chosen,
                instruct if instruct and value == 0 else Decoding(temperature, top_p, top_k),
            )
            for value in sorted(set(lambdas))
        ]
        for chosen, temperature, top_p in product(groups, temperatures, top_ps)
    ]


def settings_of(curves: Iterable[Sequence[Setting]]) -> list[Setting]:
    """Returns the settings of all curves, each once; curves may share settings."""
    return list(dict.fromkeys(chain.from_iterable(curves)))


def planned_samples(
    settings: Iterable[tuple[Setting, range]], questions: Sequence[Question]
) -> Iterator[PlannedSample]:
    """Yields every setting's samples of every question.

    Settings change fastest and questions slowest. `settings` names the samples of each.
    """
    work = list(settings)
    last = max((samples.stop for _, samples in work), default=0)
    for question in questions:
        for sample in range(last):
            for setting, samples in work:
                if sample in samples:
                    yield PlannedSample(setting, question, sample)


def ablation_groups(layers: int) -> list[str]:
    """Returns the groups of the paper's ablation: all, one module kind, and two thirds or one
    third of the layers. Raises `BadParameters` for fewer than 3 layers.
    """
    if layers < 3:
        raise BadParameters(f"an ablation by thirds needs 3 layers; this model has {layers}")
    third, two = round(layers / 3), round(2 * layers / 3)
    ranges = [(0, two), (third, layers), (0, third), (third, two), (two, layers)]
    return [ALL, "mlp", "attn", *(f"{first}-{end - 1}" for first, end in ranges)]


def lambda_field(groups: str, value: float, layers: int) -> float | dict[str, Any]:
    """Returns the field `reasoning_lambda` for λ = `value` in `groups` and 0 elsewhere.

    λ is the default and the other groups are named, so that λ chooses the chat template. Raises
    `BadParameters` for unknown groups, or layers that the model lacks.
    """
    if groups == ALL:
        return value
    first, last, part = _parsed(groups, layers)
    wire: dict[str, Any] = {"default": value, "embed": 0.0, "head": 0.0}
    if part is not None:
        wire["attn" if part == "mlp" else "mlp"] = 0.0
    outside = [(0, first - 1), (last + 1, layers - 1)]
    zeroed = {f"{start}-{end}": 0.0 for start, end in outside if start <= end}
    return wire | ({"layers": zeroed} if zeroed else {})


def _parsed(groups: str, layers: int) -> tuple[int, int, str | None]:
    """Returns the first and the last layer, and the part of a layer or None for both parts."""
    match = _GROUPS.fullmatch(groups)
    if match is None:
        raise BadParameters(
            f"--dials: {groups!r} is none of `all`, `mlp`, `attn`, `0-3` and `0-3.mlp`"
        )
    first, last = int(match[1] or 0), layers - 1 if match[2] is None else int(match[2])
    if not first <= last < layers:
        raise BadParameters(f"--dials: {groups!r}: this model has layers 0 to {layers - 1}")
    return first, last, match[3] or match[4]
