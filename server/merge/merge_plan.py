"""What a merge writes: the command's arguments, checked, with the endpoints as directories."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from mi_runtime.request import Dial
from server.config import ConfigError
from server.routing.group_lambdas import PARAM, check_lambda, dial_of_groups, dial_to_json
from server.text.checkpoint import local_directory, read_json
from server.wire.errors import InvalidRequest
from server.wire.reasoning_fields import GroupLambdas

FINEST_GRID: Final = 1e-9
"""Practically no grid: a merged checkpoint may have any λ."""
GROUPS_OF_TIED: Final = ("embed", "head")
METHODS: Final = ("interpolation", "task-arithmetic", "ties")
DEFAULT_SCALE: Final = {"task-arithmetic": 0.7, "ties": 0.5}
"""The values of arXiv 2510.10977."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What to merge, after parsing and checks."""

    arguments: argparse.Namespace
    instruct: Path
    thinking: Path
    config: dict[str, Any]  # of the Instruct endpoint
    dial: Dial | None  # of an interpolation

    @property
    def template(self) -> Path:
        """The directory of the endpoint whose template and sampling defaults the model gets."""
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
        """The λ of an interpolation, as `--lambda` takes it."""
        assert self.dial is not None
        return json.dumps(dial_to_json(self.dial, int(self.config["num_hidden_layers"])))

    @property
    def scale(self) -> float:
        """The factor of the task vectors; only for the methods that have one."""
        given = self.arguments.scale
        return DEFAULT_SCALE[self.arguments.method] if given is None else float(given)


def plan_merge(arguments: argparse.Namespace) -> MergePlan:
    """Returns the plan. Raises `CommandError` for arguments or endpoints that cannot be used."""
    _check_together(arguments)
    instruct, thinking = map(local_directory, (arguments.instruct, arguments.thinking))
    config = read_json(instruct / "config.json")
    dial = None
    if arguments.method == "interpolation":
        dial = _dial(arguments.reasoning_lambda, layers=int(config.get("num_hidden_layers", 0)))
    return MergePlan(arguments, instruct, thinking, config, dial)


def _check_together(arguments: argparse.Namespace) -> None:
    if arguments.method == "interpolation":
        for name in ("base", "scale"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} is allowed only with --method task-arithmetic or ties")
        if arguments.reasoning_lambda is None:
            raise ConfigError("--method interpolation requires --lambda")
        return
    if arguments.reasoning_lambda is not None:
        raise ConfigError("--lambda is allowed only with --method interpolation")
    if arguments.base is None:
        raise ConfigError(f"--method {arguments.method} requires --base")
    if not 0 < arguments.density <= 1:
        raise ConfigError(f"--density must be above 0 and at most 1, not {arguments.density}")


def _dial(text: str, layers: int) -> Dial:
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            groups = GroupLambdas.model_validate_json(text)
            return dial_of_groups(groups, step=FINEST_GRID, layers=layers)
        check_lambda(float(value), "--lambda")
        return Dial.on_grid(float(value), FINEST_GRID)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"--lambda: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except InvalidRequest as error:
        raise ConfigError(f"--lambda: {error.message.replace(f'{PARAM}.', '')}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--lambda: {text!r} is neither a number nor a JSON object of λ by blend group"
        ) from error
