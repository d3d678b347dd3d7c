"""The model card names the merged models and the command that repeats the merge."""

import argparse
from pathlib import Path
from typing import Any

from mi_runtime.request import Dial
from server.merge.merge_plan import MergePlan
from server.merge.model_card import model_card


def card(dial: Dial | None, **arguments: Any) -> str:
    defaults = {"think_threshold": 0.0, "method": "interpolation", "scale": None, "density": 0.2}
    given = argparse.Namespace(**defaults | arguments)
    return model_card(MergePlan(given, Path("i"), Path("t"), {"num_hidden_layers": 4}, dial))


def test_a_hub_id_is_named_completely_and_a_directory_by_its_last_part(tmp_path: Path) -> None:
    text = card(Dial(0.6), instruct=str(tmp_path), thinking="owner/Thinking")
    assert f"base_model:\n- {tmp_path.name}\n- owner/Thinking\n" in text
    assert str(tmp_path) not in text
    assert f"--instruct {tmp_path.name} --thinking owner/Thinking --lambda '0.6' --out" in text


def test_an_interpolation_names_its_lambda_and_its_template() -> None:
    text = card(Dial(0.6, (("head", 0.2),)), instruct="a/I", thinking="a/T", think_threshold=0.7)
    assert '# a/I × a/T, λ = {"default": 0.6, "head": 0.2}\n' in text
    assert "are the Instruct endpoint's" in text


def test_a_baseline_names_its_base_its_scale_and_the_density_of_ties() -> None:
    names = {"instruct": "a/I", "thinking": "a/T", "base": "a/Base"}
    ties = card(None, method="ties", density=0.3, **names)
    assert "- a/Base\n" in ties
    assert "--method ties --base a/Base --scale 0.5 --density 0.3 --out" in ties
    assert "density" not in card(None, method="task-arithmetic", scale=1.0, **names)
