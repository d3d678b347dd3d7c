"""The embedded pair: a tiny Qwen3-architecture endpoint pair shipped as package data.

Knows where the two checkpoints lie. `task` states the questions they answer, `tokenizer` builds
their vocabulary and chat template, `train` makes the weights from nothing. Importing this package
loads neither torch nor a weight.
"""

from pathlib import Path
from typing import Final

INSTRUCT_DIRECTORY: Final = Path(__file__).with_name("instruct")
THINKING_DIRECTORY: Final = Path(__file__).with_name("thinking")

__all__ = ["INSTRUCT_DIRECTORY", "THINKING_DIRECTORY"]
