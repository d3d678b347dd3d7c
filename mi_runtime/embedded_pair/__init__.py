"""The embedded pair: a tiny pair of Qwen3-architecture checkpoints, shipped as package data.

This module has the paths of the two checkpoints. `task` defines the questions that they answer,
`tokenizer` builds their vocabulary and chat template, and `train` trains the weights from scratch.
It imports no other package. Others import only `task`. Importing this module loads neither torch
nor any weights.
"""

from pathlib import Path
from typing import Final

INSTRUCT_DIRECTORY: Final = Path(__file__).with_name("instruct")
THINKING_DIRECTORY: Final = Path(__file__).with_name("thinking")

__all__ = ["INSTRUCT_DIRECTORY", "THINKING_DIRECTORY"]
