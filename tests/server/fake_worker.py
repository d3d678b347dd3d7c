"""An engine process without a model: speaks the pipe, and says what the prompt tells it to.

The last user message is a command:

    say TEXT      TEXT, then end-of-sequence        lambda      the λ of the request
    request       dial, answer's dial and think policy, as JSON
    forever       `a` until max_tokens or abort     sampling    some sampling fields, as JSON
    wait          nothing: stays in the queue       fail        two tokens, then an error
    die           three tokens, then the process    wedge       three tokens, then nothing is
                  exits with code 7                             read or sent any more
"""

import argparse
import json
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tokenizers import Tokenizer

from mi_runtime.config import EngineConfig, TokenMarks
from mi_runtime.request import (
    Abort,
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    LoadFailed,
    Ready,
    StepReport,
    Submit,
    TokenEvent,
    TokenLogprobs,
)
from mi_runtime.scheduling.thinking import ThinkingState

USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
FOREVER = 10**9


@dataclass
class Running:
    """One request and what it still has to say."""

    request: EngineRequest
    command: str
    script: list[int]
    eos: int
    marks: TokenMarks
    said: int = 0
    scored: bool = False  # the prompt's log-probabilities are told
    scripted: int = 0  # the rest was forced
    thinking: ThinkingState | None = field(init=False)

    def __post_init__(self) -> None:
        think = self.request.think
        self.thinking = None if think is None else ThinkingState(think, self.marks)

    def next_event(self) -> TokenEvent:
        sampling = self.request.sampling
        if self.command == "fail" and self.said == 2:
            return TokenEvent(self.request.request_id, None, FinishReason.ERROR, error="told to")
        scores = self._prompt_logprobs()
        if sampling.max_tokens == 0:
            reason = FinishReason.LENGTH
            return TokenEvent(self.request.request_id, None, reason, prompt_logprobs=scores)
        token = self._next_token()
        self.said += 1
        if self.thinking is not None:
            self.thinking.observe(token)
        finish = None
        if token in sampling.ending_token_ids and self.said > sampling.min_tokens:
            finish = FinishReason.STOP
        elif self.said == sampling.max_tokens:
            finish = FinishReason.LENGTH
        return TokenEvent(
            self.request.request_id,
            token,
            finish,
            self._logprobs(token),
            reasoning_tokens=self.thinking.reasoning_tokens if self.thinking else 0,
            forced_close=self.thinking is not None and self.thinking.forced_close,
            queue_seconds=0.001,
            prompt_logprobs=scores,
        )

    def _prompt_logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """-1, -2, … for the tokens of the prompt, each the best one."""
        count = self.request.sampling.prompt_logprobs
        if count is None or self.scored:
            return None
        self.scored = True
        return tuple(
            TokenLogprobs(-i, tuple((token + j, -i - j) for j in range(count)))
            for i, token in enumerate(self.request.prompt[1:], 1)
        )

    def _next_token(self) -> int:
        if self.thinking is not None and self.thinking.forced_token is not None:
            return self.thinking.forced_token
        endless = self.command in ("forever", "fail", "die", "wedge")
        token = self.script[self.scripted % len(self.script)]
        if not endless and self.scripted >= len(self.script):
            token = self.eos
        self.scripted += 1
        return token

    def _logprobs(self, token: int) -> TokenLogprobs | None:
        count = self.request.sampling.logprobs
        if count is None:
            return None
        return TokenLogprobs(-0.5, tuple((token + i, -0.5 - i) for i in range(count)))


def told(request: EngineRequest) -> dict[str, Any]:
    dial, answer, think = request.dial, request.answer_dial, request.think
    return {
        "dial": [dial.reasoning_lambda, dict(dial.groups)],
        "answer": None if answer is None else [answer.reasoning_lambda, dict(answer.groups)],
        "think": None if think is None else [think.cap, think.soft_window, list(think.closing)],
        "grammar": request.grammar,
        "seed": request.sampling.seed,
        "prompt": len(request.prompt),
        "priority": request.priority,
        "cache_salt": request.cache_salt,
    }


class FakeEngine:
    def __init__(self, pipe: Connection, config: EngineConfig, step_seconds: float) -> None:
        self.pipe = pipe
        self.tokenizer = Tokenizer.from_file(str(Path(config.thinking) / "tokenizer.json"))
        (self.eos,) = self.tokenizer.encode("<|im_end|>", add_special_tokens=False).ids
        self.max_num_seqs = config.max_num_seqs
        self.marks = config.marks
        self.step_seconds = step_seconds
        self.running: dict[str, Running] = {}
        self.waiting: dict[str, Running] = {}
        self.steps = 0

    def serve(self) -> None:
        while True:
            try:
                self.read_commands()
            except EOFError:
                return
            if self.running:
                self.step()
                time.sleep(self.step_seconds)

    def read_commands(self) -> None:
        while self.pipe.poll(0 if self.running else None):
            match self.pipe.recv():
                case Submit(request):
                    self.submit(request)
                case Abort(request_id):
                    gone = self.running.pop(request_id, None) or self.waiting.pop(request_id, None)
                    if gone:
                        self.report([TokenEvent(request_id, None, FinishReason.ABORT)])

    def submit(self, request: EngineRequest) -> None:
        text = self.tokenizer.decode(list(request.prompt), skip_special_tokens=False)
        command = (USER_TURN.findall(text) or [text])[-1]  # a raw prompt is the command itself
        new = Running(request, command, self.script(command, request), self.eos, self.marks)
        if command == "wait" or len(self.running) >= self.max_num_seqs:
            self.waiting[request.request_id] = new
            self.report([])
        else:
            self.running[request.request_id] = new

    def script(self, command: str, request: EngineRequest) -> list[int]:
        text = "a"
        if command.startswith("say "):
            text = command.removeprefix("say ")
        elif command == "lambda":
            text = f"{request.dial.reasoning_lambda:g}"
        elif command == "request":
            text = json.dumps(told(request))
        elif command == "sampling":
            sampling = request.sampling
            text = json.dumps(
                {
                    "temperature": sampling.temperature,
                    "max_tokens": sampling.max_tokens,
                    "seed": sampling.seed,
                    "top_k": sampling.top_k,
                    "eos": sorted(sampling.eos_token_ids),
                }
            )
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def step(self) -> None:
        self.steps += 1
        events = [running.next_event() for running in self.running.values()]
        for event in events:
            if event.finish_reason is not None:
                del self.running[event.request_id]
        self.report(events)
        for running in self.running.values():
            if running.said == 3 and running.command == "die":
                os._exit(7)
            if running.said == 3 and running.command == "wedge":
                time.sleep(FOREVER)
        while self.waiting and len(self.running) < self.max_num_seqs:
            ready = [key for key, it in self.waiting.items() if it.command != "wait"]
            if not ready:
                break
            self.running[ready[0]] = self.waiting.pop(ready[0])

    def report(self, events: list[TokenEvent]) -> None:
        stats = EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            used_blocks=len(self.running),
            total_blocks=64,
            running_lambdas=self.lambdas(self.running),
            waiting_lambdas=self.lambdas(self.waiting),
            steps=self.steps,
            pair_executions=self.steps,
        )
        self.pipe.send(StepReport(tuple(events), stats))

    def lambdas(self, requests: dict[str, Running]) -> tuple[float, ...]:
        return tuple(sorted({it.request.dial.reasoning_lambda for it in requests.values()}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--fail-load")
    parser.add_argument("--load-gate", type=Path, help="load once this file exists")
    parser.add_argument("--step-seconds", type=float, default=0.0005)
    parser.add_argument("--context", type=int, default=2048)
    arguments = parser.parse_args()
    pipe = Connection(arguments.fd)
    config: EngineConfig = pipe.recv()
    while arguments.load_gate and not arguments.load_gate.exists():
        if pipe.poll(0.01):
            return  # the server went
    if arguments.fail_load:
        pipe.send(LoadFailed(arguments.fail_load))
        sys.exit(2)
    engine = FakeEngine(pipe, config, arguments.step_seconds)
    info = EngineInfo(
        pair_identity="1" * 32,
        fingerprint="0123456789abcdef" * 4,
        model_type="fake",
        device="cpu",
        dtype="float32",
        delta_dtype="none",
        vocab_size=engine.tokenizer.get_vocab_size(),
        max_model_len=config.max_model_len or arguments.context,
        block_size=16,
        num_blocks=64,
        layers=4,
        weight_bytes=4_820_000,
        peak_bytes=9_000_000_000,
        load_seconds=0.0,
    )
    pipe.send(Ready(info))
    with suppress(BrokenPipeError):
        engine.serve()


if __name__ == "__main__":
    main()
