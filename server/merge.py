"""`mi-server merge`: writes one λ, or a baseline merge, as a checkpoint that any engine can load.

    mi-server merge --lambda 0.6 --out DIR
    mi-server merge --lambda '{"default": 0.6, "layers": {"0-1": 0}}' --out DIR
    mi-server merge --method ties --base BASE --density 0.2 --scale 0.5 --out DIR

A child process (`mi_runtime.model.merge`) writes the weights. This module writes the other files:
config, tokenizer, the chat template that the server would take at this λ, and a model card. All are
written to a temporary directory next to DIR, which is renamed at the end: a run that ends early
leaves no DIR.
"""

import argparse
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.request import Dial
from server import __version__
from server.config import ConfigError
from server.exit_codes import ExitCode
from server.routing.group_lambdas import dial_of_groups, dial_to_json
from server.text.checkpoint import CheckpointError, eos_token_ids_of, local_directory, read_json
from server.wire.errors import InvalidRequest
from server.wire.reasoning_fields import GroupLambdas

FINEST_GRID: Final = 1e-9
"""Practically no grid: a merged checkpoint may have any λ."""
TEXT_FILES: Final = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "*.jinja")
GROUPS_OF_TIED: Final = ("embed", "head")
METHODS: Final = ("interpolation", "task-arithmetic", "ties")
DEFAULT_SCALE: Final = {"task-arithmetic": 0.7, "ties": 0.5}
"""The values of arXiv 2510.10977."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What to merge, after parsing and checks."""

    arguments: argparse.Namespace
    instruct: Path
    thinking: Path
    config: dict[str, Any]  # of the Instruct endpoint
    dial: Dial | None  # of an interpolation

    @property
    def template(self) -> Path:
        """Directory of the endpoint whose template and sampling defaults the merged model gets."""
        value = 1.0 if self.dial is None else self.dial.reasoning_lambda
        return self.thinking if value > self.arguments.think_threshold else self.instruct

    @property
    def unties(self) -> bool:
        """Whether a tied embedding and head have different λ, and so become two tensors."""
        if self.dial is None or not self.config.get("tie_word_embeddings"):
            return False
        return len({self.dial.value_of(group) for group in GROUPS_OF_TIED}) > 1

    @property
    def lambda_json(self) -> str:
        assert self.dial is not None
        return json.dumps(dial_to_json(self.dial, int(self.config["num_hidden_layers"])))


def main(arguments: Sequence[str]) -> int:
    """Runs `mi-server merge` and returns the exit code. Raises `CommandError`."""
    merge = _checked(_parser().parse_args(arguments))
    out = merge.arguments.out
    if out.exists():
        raise ConfigError(f"{out}: exists already; nothing was written")
    prefix = f".{out.name}.partial-"
    for leftover in out.parent.glob(f"{glob.escape(prefix)}*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as directory:
            partial = Path(directory) / out.name
            partial.mkdir()
            _write(merge, partial)
            partial.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror or error}") from error
    print(f"Merged into {out}")
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mi-server merge",
        description="Writes one λ, or a baseline merge, as a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--instruct",
        default=str(INSTRUCT_DIRECTORY),
        help="Instruct endpoint: a directory or hub id",
    )
    add(
        "--thinking",
        default=str(THINKING_DIRECTORY),
        help="Thinking endpoint: a directory or hub id",
    )
    add("--lambda", dest="reasoning_lambda", help="a number, or λ by blend group as JSON")
    add("--out", type=Path, required=True, help="directory to write; it must not exist")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the files; default: that of the endpoints",
    )
    add("--think-threshold", type=float, default=0.0, help="highest λ with Instruct's template")
    add("--method", choices=METHODS, default="interpolation")
    add("--base", help="model that both were tuned from; for task-arithmetic and ties")
    add("--scale", type=float, help="factor of the task vectors; default: 0.7 (ties: 0.5)")
    add("--density", type=float, default=0.2, help="share of each task vector that ties keeps")
    return parser


def _checked(arguments: argparse.Namespace) -> Merge:
    _check_together(arguments)
    instruct, thinking = map(local_directory, (arguments.instruct, arguments.thinking))
    config = read_json(instruct / "config.json")
    dial = None
    if arguments.method == "interpolation":
        dial = _dial(arguments.reasoning_lambda, layers=int(config.get("num_hidden_layers", 0)))
    return Merge(arguments, instruct, thinking, config, dial)


def _check_together(arguments: argparse.Namespace) -> None:
    if arguments.method == "interpolation":
        for name in ("base", "scale"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} belongs to --method task-arithmetic and ties")
        if arguments.reasoning_lambda is None:
            raise ConfigError("--lambda is missing")
        return
    if arguments.reasoning_lambda is not None:
        raise ConfigError("--lambda belongs to --method interpolation")
    if arguments.base is None:
        raise ConfigError(f"--method {arguments.method} needs --base")
    if not 0 < arguments.density <= 1:
        raise ConfigError(f"--density must be above 0 and at most 1, not {arguments.density}")


def _dial(text: str, layers: int) -> Dial:
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            groups = GroupLambdas.model_validate_json(text)
            return dial_of_groups(groups, step=FINEST_GRID, layers=layers)
        return Dial.on_grid(float(value), FINEST_GRID)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"--lambda: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except InvalidRequest as error:
        raise ConfigError(f"--lambda: {error.message}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--lambda: neither a λ nor λ by blend group: {error}") from error


def _write(merge: Merge, out: Path) -> None:
    _write_weights(merge, out)
    for pattern in TEXT_FILES:
        for path in merge.template.glob(pattern):
            shutil.copyfile(path, out / path.name)
    _write_json(out / "config.json", _config(merge))
    _write_json(out / "generation_config.json", _generation_config(merge))
    (out / "README.md").write_text(_card(merge), encoding="utf-8")


def _write_weights(merge: Merge, out: Path) -> None:
    given = merge.arguments
    command = [sys.executable, "-m", "mi_runtime.model.merge", "--method", given.method]
    command += ["--instruct", str(merge.instruct), "--thinking", str(merge.thinking)]
    command += ["--out", str(out)]
    if merge.dial is not None:
        dial = [merge.dial.reasoning_lambda, merge.dial.groups]
        command += ["--dial", json.dumps(dial)]
    else:
        command += ["--base", str(local_directory(given.base)), "--scale", f"{_scale(given)}"]
        command += ["--density", f"{given.density}"]
    command += ["--dtype", given.dtype] if given.dtype else []
    command += ["--untie"] if merge.unties else []
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise CheckpointError(f"the weights were not merged (exit code {done.returncode})")


def _scale(given: argparse.Namespace) -> float:
    return DEFAULT_SCALE[given.method] if given.scale is None else float(given.scale)


def _config(merge: Merge) -> dict[str, Any]:
    config = read_json(merge.template / "config.json")
    if merge.arguments.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = merge.arguments.dtype
    return config | ({"tie_word_embeddings": False} if merge.unties else {})


def _generation_config(merge: Merge) -> dict[str, Any]:
    """The chosen endpoint's sampling defaults, with the end tokens of both endpoints."""
    name = "generation_config.json"
    ends = [eos_token_ids_of(read_json(one / name)) for one in (merge.instruct, merge.thinking)]
    config = read_json(merge.template / name)
    return config | ({"eos_token_id": sorted(ends[0] | ends[1])} if any(ends) else {})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(merge: Merge) -> str:
    given = merge.arguments
    names = [_public_name(one) for one in (given.instruct, given.thinking)]
    if merge.dial is not None:
        title, what = f"λ = {merge.lambda_json}", "Θ(λ) = λ·Θ_Thinking + (1−λ)·Θ_Instruct"
        made = f"--lambda '{merge.lambda_json}'"
    else:
        names.append(_public_name(given.base))
        title = given.method
        made = f"--method {given.method} --base {names[-1]} --scale {_scale(given):g}"
        what = "task vectors of both endpoints over their base"
        made += f" --density {given.density:g}" if given.method == "ties" else ""
    listed = "".join(f"- {name}\n" for name in names)
    template = "Thinking" if merge.template == merge.thinking else "Instruct"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model:
{listed}base_model_relation: merge
tags:
- merge
- model-interpolation
---

# {names[0]} × {names[1]}, {title}

{what} (arXiv 2510.10977), computed in fp32 and rounded once to the format of the files. Tokenizer,
chat template and sampling defaults are the {template} endpoint's. The licences of the endpoints
apply.

Written by mi-server {__version__}:

    mi-server merge --instruct {names[0]} --thinking {names[1]} {made} --out DIR

mi-server serves the same λ, and every other, from the two endpoints without merging.
"""


def _public_name(name: str) -> str:
    """A hub id unchanged; of a directory only its last part."""
    return Path(name).name if os.path.isdir(name) else name
