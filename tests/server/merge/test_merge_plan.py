"""A merge is planned from its arguments: the λ, the scale, the template, and what is refused."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from mi_runtime.request import Dial
from server.config import ConfigError
from server.merge.merge_plan import MergePlan, plan_merge


@pytest.fixture
def plan(tmp_path: Path) -> Any:
    """Returns a function that plans a merge of two small endpoints with these arguments."""
    for name in ("instruct", "thinking"):
        (tmp_path / name).mkdir()
        config = {"num_hidden_layers": 4, "tie_word_embeddings": True}
        (tmp_path / name / "config.json").write_text(json.dumps(config))

    def make(**arguments: Any) -> MergePlan:
        defaults = {
            "instruct": str(tmp_path / "instruct"),
            "thinking": str(tmp_path / "thinking"),
            "reasoning_lambda": None,
            "method": "interpolation",
            "base": None,
            "scale": None,
            "density": 0.2,
            "think_threshold": 0.0,
        }
        return plan_merge(argparse.Namespace(**defaults | arguments))

    return make


def test_lambda_is_a_number_or_an_object_of_blend_groups(plan: Any) -> None:
    assert plan(reasoning_lambda="0.123456789").dial == Dial(0.123456789)
    grouped = plan(reasoning_lambda='{"default": 0.6, "attn": 0.6, "head": 0.2}')
    assert grouped.dial == Dial(0.6, (("head", 0.2),))
    assert json.loads(grouped.lambda_json) == {"default": 0.6, "head": 0.2}


@pytest.mark.parametrize(
    ("value", "threshold", "template"),
    [("0", 0.0, "instruct"), ("0.1", 0.0, "thinking"), ("0.3", 0.3, "instruct")],
)
def test_the_template_is_that_of_the_server_at_this_lambda(
    plan: Any, value: str, threshold: float, template: str
) -> None:
    planned = plan(reasoning_lambda=value, think_threshold=threshold)
    assert planned.template.name == template


def test_a_baseline_has_thinkings_template_and_the_papers_scale(plan: Any) -> None:
    for method, scale in (("task-arithmetic", 0.7), ("ties", 0.5)):
        planned = plan(method=method, base="base")
        assert (planned.dial, planned.template.name, planned.scale) == (None, "thinking", scale)
        assert plan(method=method, base="base", scale=0.0).scale == 0.0


def test_a_tied_embedding_is_untied_only_if_the_head_has_another_lambda(plan: Any) -> None:
    assert not plan(reasoning_lambda="0.5").unties
    assert plan(reasoning_lambda='{"default": 0.5, "head": 0.6}').unties
    assert not plan(reasoning_lambda='{"default": 0.5, "head": 0.6, "embed": 0.6}').unties
    assert not plan(method="ties", base="base").unties


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "interpolation requires --lambda"),
        ({"reasoning_lambda": "1.1"}, "--lambda"),
        ({"reasoning_lambda": "[0.5]"}, "neither a number nor a JSON object"),
        ({"reasoning_lambda": '{"default": 0.5, "atn": 1}'}, "--lambda: atn"),
        ({"reasoning_lambda": '{"default": 0, "layers": {"9": 1}}'}, "--lambda: .*layers"),
        ({"reasoning_lambda": "0.5", "base": "b"}, "--base is allowed only with"),
        ({"reasoning_lambda": "0.5", "scale": 0.5}, "--scale is allowed only with"),
        (
            {"method": "ties", "base": "b", "reasoning_lambda": "0.5"},
            "--lambda is allowed only with",
        ),
        ({"method": "ties"}, "requires --base"),
        ({"method": "ties", "base": "b", "density": 0.0}, "--density must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    plan: Any, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(**arguments)
