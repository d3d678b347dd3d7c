"""Writes a merged checkpoint: weights, config, tokenizer, chat template and model card.

A child process (`mi_runtime.model.merge_weights`) writes the weights. The other files come from the
endpoint whose chat template the server would take at this λ.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from server.merge.merge_plan import MergePlan
from server.merge.model_card import model_card
from server.text.checkpoint import CheckpointError, eos_token_ids_of, local_directory, read_json

TEXT_FILES: Final = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "*.jinja")


def write_checkpoint(plan: MergePlan, out: Path) -> None:
    """Writes all files to the directory `out`. Raises `CommandError` and `OSError`."""
    _write_weights(plan, out)
    for pattern in TEXT_FILES:
        for path in plan.template.glob(pattern):
            shutil.copyfile(path, out / path.name)
    _write_json(out / "config.json", _config(plan))
    _write_json(out / "generation_config.json", _generation_config(plan))
    (out / "README.md").write_text(model_card(plan), encoding="utf-8")


def _write_weights(plan: MergePlan, out: Path) -> None:
    given = plan.arguments
    command = [sys.executable, "-m", "mi_runtime.model.merge_weights", "--method", given.method]
    command += ["--instruct", str(plan.instruct), "--thinking", str(plan.thinking)]
    command += ["--out", str(out)]
    if plan.dial is not None:
        dial = [plan.dial.reasoning_lambda, plan.dial.groups]
        command += ["--dial", json.dumps(dial)]
    else:
        command += ["--base", str(local_directory(given.base)), "--scale", f"{plan.scale}"]
        command += ["--density", f"{given.density}"]
    command += ["--dtype", given.dtype] if given.dtype else []
    command += ["--untie"] if plan.unties else []
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise CheckpointError(f"the weights were not merged (exit code {done.returncode})")


def _config(plan: MergePlan) -> dict[str, Any]:
    config = read_json(plan.template / "config.json")
    if plan.arguments.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = plan.arguments.dtype
    return config | ({"tie_word_embeddings": False} if plan.unties else {})


def _generation_config(plan: MergePlan) -> dict[str, Any]:
    """Returns the chosen endpoint's sampling defaults, with the end tokens of both endpoints."""
    name = "generation_config.json"
    ends = [eos_token_ids_of(read_json(one / name)) for one in (plan.instruct, plan.thinking)]
    config = read_json(plan.template / name)
    return config | ({"eos_token_id": sorted(ends[0] | ends[1])} if any(ends) else {})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
