"""Host time of a decode step: what the engine spends outside the model's forward.

    python -m bench.host [--rows 32] [--lambdas 32]

Medians over the steps of one run on the embedded pair, in milliseconds: scheduling, planning and
building the batch, sampling, update. Greedy, and again with temperature and top-p.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.report import publish
from bench.static import blended_config
from bench.workload import EMBEDDED_PAIR, prompts
from mi_runtime.engine import Engine
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.worker import default_threads

STEPS = 200
GREEDY = SamplingParams(max_tokens=STEPS, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=STEPS, temperature=0.7, top_p=0.95, top_k=20, seed=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--lambdas", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(default_threads())
    engine = Engine(blended_config(EMBEDDED_PAIR))
    values = {}
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        for part, milliseconds in run(engine, arguments.rows, arguments.lambdas, sampling).items():
            values[f"{name}: {part}"] = milliseconds
    host = {name: median(values[f"{name}: outside the forward"]) for name in ("greedy", "sampled")}
    publish("host", "ms a step", values, {f"{name}, ms": value for name, value in host.items()})


def run(
    engine: Engine, rows: int, lambdas: int, sampling: SamplingParams
) -> dict[str, list[float]]:
    """Milliseconds of every decode step, by part."""
    runner, scheduler = engine._runner, engine.scheduler
    clock = Clock()
    watched = [
        (scheduler, "schedule", "schedule"),
        (scheduler, "update", "update"),
        (runner.planner, "plan", "plan"),
        (runner._sampler, "sample", "sample"),
    ]
    originals = [getattr(owner, method) for owner, method, _ in watched]
    for (owner, method, part), original in zip(watched, originals, strict=True):
        setattr(owner, method, clock.timed(part, original))
    forward = runner._model.model.forward
    runner._model.model.forward = clock.timed("forward", forward)
    for index, prompt in enumerate(prompts(EMBEDDED_PAIR, seed=0, count=rows)):
        dial = Dial.on_grid(index % lambdas / max(1, lambdas - 1), 0.01)
        engine.submit(
            EngineRequest(f"{sampling.temperature}-{index}", tuple(prompt), dial, sampling)
        )
    engine.step()  # prefill
    clock.steps.clear()
    while not engine.idle:
        clock.step(engine.step)
    for (owner, method, _), original in zip(watched, originals, strict=True):
        setattr(owner, method, original)
    runner._model.model.forward = forward
    return clock.table()


class Clock:
    """Seconds of the parts of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._now[part] = self._now.get(part, 0.0) + time.perf_counter() - started

        return timed_call

    def step(self, call: Callable[[], Any]) -> None:
        self._now = {}
        self.timed("whole step", call)()
        outside = self._now["whole step"] - self._now["forward"]
        named = sum(self._now[part] for part in ("schedule", "update", "plan", "sample"))
        self.steps.append(
            {**self._now, "outside the forward": outside, "build and the rest": outside - named}
        )

    def table(self) -> dict[str, list[float]]:
        return {part: [one[part] * 1e3 for one in self.steps] for part in self.steps[0]}


if __name__ == "__main__":
    main()
