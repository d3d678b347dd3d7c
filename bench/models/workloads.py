"""The requests of a round: 32 on the embedded pair, or on the mid-size one."""

import random
from dataclasses import dataclass

from bench.measuring.folders import BUILD
from bench.models.midsize_pair import write_midsize_pair
from mi_runtime.config import Dtype, EngineConfig
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.request import Dial, EngineRequest, SamplingParams

REQUESTS = 32


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair, and the tokens of each request to it."""

    name: str
    instruct: str
    thinking: str
    dtype: Dtype
    prompt_tokens: int
    new_tokens: int


EMBEDDED_PAIR = Pair(
    "embedded", str(INSTRUCT_DIRECTORY), str(THINKING_DIRECTORY), "float32", 30, 128
)
EMBEDDED = EngineConfig(
    instruct=str(INSTRUCT_DIRECTORY), thinking=str(THINKING_DIRECTORY), prefix_caching=False
)
NEW_TOKENS = EMBEDDED_PAIR.new_tokens


def midsize_pair() -> Pair:
    instruct, thinking = write_midsize_pair(BUILD / "midsize")
    return Pair("midsize", str(instruct), str(thinking), "bfloat16", 16, 12)


def prompts(pair: Pair, seed: int, count: int = REQUESTS) -> list[list[int]]:
    """Returns prompts of random token ids without special tokens."""
    draw = random.Random(seed)
    return [draw.choices(range(16, 300), k=pair.prompt_tokens) for _ in range(count)]


def requests(pair: Pair, lambdas: list[float], seed: int) -> list[EngineRequest]:
    sampling = SamplingParams(max_tokens=pair.new_tokens, temperature=0.0)
    work = zip(prompts(pair, seed, len(lambdas)), lambdas, strict=True)
    return [
        EngineRequest(f"{seed}-{index}", tuple(prompt), Dial(round(value, 4)), sampling)
        for index, (prompt, value) in enumerate(work)
    ]
