"""Converts λ by blend group: from what a client writes to a dial, and from a dial to JSON.

    {"default": 0.6, "attn": 0.8, "head": 0, "layers": {"0-11": 0, "14": {"mlp": 1}}}

A group takes the λ of its layer range, or else that of its part (`attn`, `mlp`, `embed`, `head`),
or else the default. Ranges are inclusive and do not overlap.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from mi_runtime.request import Dial
from server.wire.errors import InvalidRequest, bounded
from server.wire.reasoning_fields import GroupLambdas, LayerLambdas

PARAM: Final = "reasoning_lambda"
PARTS: Final = ("attn", "mlp")  # of a layer
ENDS: Final = ("embed", "head")  # outside the layers
_RANGE: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


def dial_of_groups(given: GroupLambdas, *, step: float, layers: int) -> Dial:
    """Returns the dial that `given` means for a model of `layers` layers, on the grid of `step`.

    If every group is named and there is no default, the most common λ becomes the default.
    Raises `InvalidRequest` that names the key.
    """
    for key, value in _numbers(given):
        check_lambda(value, key)
    values = _values(given, layers)
    missing = [name for name in _group_names(layers) if name not in values]
    default = given.default
    if default is None:
        if missing:
            raise InvalidRequest(
                f"`{PARAM}.default` is required: no λ is set for {len(missing)} blend groups, such "
                f"as `{missing[0]}`",
                param=f"{PARAM}.default",
            )
        default = _most_common(values.values())
    return Dial.on_grid(default, step, values)


def dial_to_json(dial: Dial, layers: int) -> float | dict[str, Any]:
    """Returns a dial as JSON: a number if every group has the same λ.

    Otherwise it is an object like a client's, in one normal form: `attn` and `mlp` are what most
    layers have, and `layers` lists the other layers.
    """
    default, own = dial.reasoning_lambda, dict(dial.groups)
    if not own:
        return default
    parts = {part: _of_layers(part, own, default, layers) for part in PARTS}
    usual = {part: _most_common(values, default) for part, values in parts.items()}
    ranges = _layer_ranges([_layer_entry(parts, usual, layer) for layer in range(layers)])
    written: dict[str, Any] = {"default": default}
    written |= {part: value for part, value in usual.items() if value != default}
    written |= {name: own[name] for name in ENDS if name in own}
    return written | ({"layers": ranges} if ranges else {})


def check_lambda(value: float, param: str) -> None:
    """Raises `InvalidRequest` about `param` for a λ outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise InvalidRequest(f"λ must be a number in [0, 1], not {value!r}", param=param)


def _group_names(layers: int) -> list[str]:
    return [*ENDS, *(f"{layer}.{part}" for layer in range(layers) for part in PARTS)]


def _numbers(given: GroupLambdas) -> Iterator[tuple[str, float]]:
    """Yields every λ with the key it is written under."""
    for name in ("default", *PARTS, *ENDS):
        value = getattr(given, name)
        if value is not None:
            yield f"{PARAM}.{name}", value
    for key, entry in given.layers.items():
        if not isinstance(entry, LayerLambdas):
            yield _range_param(key), entry
            continue
        for part, value in _parts(entry):
            yield f"{_range_param(key)}.{part}", value


def _values(given: GroupLambdas, layers: int) -> dict[str, float]:
    """Returns λ of every group that is named; a layer range overrides `attn` and `mlp`."""
    values = {name: value for name in ENDS if (value := getattr(given, name)) is not None}
    for part in PARTS:
        value = getattr(given, part)
        if value is not None:
            values |= {f"{layer}.{part}": value for layer in range(layers)}
    for layer, entry in _by_layer(given.layers, layers).items():
        values |= {f"{layer}.{part}": value for part, value in _parts(entry)}
    return values


def _parts(entry: float | LayerLambdas) -> list[tuple[str, float]]:
    if not isinstance(entry, LayerLambdas):
        return [(part, entry) for part in PARTS]
    return [(part, value) for part in PARTS if (value := getattr(entry, part)) is not None]


def _by_layer(
    ranges: Mapping[str, float | LayerLambdas], layers: int
) -> dict[int, float | LayerLambdas]:
    entries: dict[int, float | LayerLambdas] = {}
    for key, entry in ranges.items():
        for layer in _layers_of(key, layers):
            if layer in entries:
                raise InvalidRequest(
                    f"`{PARAM}.layers` sets layer {layer} twice; ranges must not overlap",
                    param=_range_param(key),
                )
            entries[layer] = entry
        if not _parts(entry):
            raise InvalidRequest(
                f"`{_range_param(key)}` must name `attn` or `mlp`", param=_range_param(key)
            )
    return entries


def _layers_of(key: str, layers: int) -> range:
    """Returns the layers that `"0-11"` or `"14"` names. Raises `InvalidRequest`."""
    match = _RANGE.fullmatch(key)
    if match is not None:
        first, last = int(match[1]), int(match[2] or match[1])
        if first <= last < layers:
            return range(first, last + 1)
    raise InvalidRequest(
        f"`{bounded(key, 40)}` is not a range of layers; write `3` or `0-{layers - 1}`: "
        f"this model has layers 0 to {layers - 1}, and ranges include both ends",
        param=_range_param(key),
    )


def _range_param(key: str) -> str:
    return f"{PARAM}.layers.{bounded(key, 40)}"


def _of_layers(part: str, own: Mapping[str, float], default: float, layers: int) -> list[float]:
    return [own.get(f"{layer}.{part}", default) for layer in range(layers)]


def _layer_entry(
    parts: Mapping[str, Sequence[float]], usual: Mapping[str, float], layer: int
) -> float | dict[str, float] | None:
    """Returns the entry of one layer in `layers`, or None if it has the usual λ."""
    entry = {part: values[layer] for part, values in parts.items() if values[layer] != usual[part]}
    if len(entry) == len(PARTS) and len(set(entry.values())) == 1:
        return next(iter(entry.values()))
    return entry or None


def _layer_ranges(by_layer: Sequence[float | dict[str, float] | None]) -> dict[str, Any]:
    """Returns `layers`, in which neighbours with equal entries share one range."""
    ranges = {}
    for entry, run in groupby(enumerate(by_layer), key=lambda numbered: numbered[1]):
        numbers = [layer for layer, _ in run]
        key = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        if entry is not None:
            ranges[key] = entry
    return ranges


def _most_common(values: Iterable[float], preferred: float | None = None) -> float:
    """Returns the most common value; a tie goes to `preferred`, then to the lowest."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value == preferred, -value))
