"""The model card of a merged checkpoint, its README.md."""

import os
from pathlib import Path

from server import __version__
from server.merge.merge_plan import MergePlan


def model_card(plan: MergePlan) -> str:
    """Returns the card: what was merged, from which models, and the command that repeats it."""
    given = plan.arguments
    names = [_public_name(one) for one in (given.instruct, given.thinking)]
    if plan.dial is not None:
        title, what = f"λ = {plan.lambda_json}", "Θ(λ) = λ·Θ_Thinking + (1−λ)·Θ_Instruct"
        made = f"--lambda '{plan.lambda_json}'"
    else:
        names.append(_public_name(given.base))
        title = given.method
        made = f"--method {given.method} --base {names[-1]} --scale {plan.scale:g}"
        what = "task vectors of both endpoints over their base"
        made += f" --density {given.density:g}" if given.method == "ties" else ""
    listed = "".join(f"- {name}\n" for name in names)
    template = "Thinking" if plan.template == plan.thinking else "Instruct"
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
    """Returns a hub id unchanged, and of a directory only the last part."""
    return Path(name).name if os.path.isdir(name) else name
