"""The workload that the benches share: 32 requests on the embedded pair, 128 new tokens each."""

import random

from mi_runtime.config import EngineConfig
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.request import Dial, EngineRequest, SamplingParams

REQUESTS = 32
PROMPT_TOKENS = 30
NEW_TOKENS = 128
EMBEDDED = EngineConfig(
    instruct=str(INSTRUCT_DIRECTORY), thinking=str(THINKING_DIRECTORY), prefix_caching=False
)
SAMPLING = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)  # no end of sequence is set


def prompts(seed: int) -> list[list[int]]:
    """Random token ids that are no special tokens."""
    draw = random.Random(seed)
    return [draw.choices(range(16, 300), k=PROMPT_TOKENS) for _ in range(REQUESTS)]


def requests(lambdas: list[float], seed: int) -> list[EngineRequest]:
    return [
        EngineRequest(f"{seed}-{index}", tuple(prompt), Dial.on_grid(value, 0.01), SAMPLING)
        for index, (prompt, value) in enumerate(zip(prompts(seed), lambdas, strict=True))
    ]
