"""Runs an engine process without a model: the engine's scheduler, with a script for each request.

Admission, the prefix cache, think blocks, grammars, ends and events are those of
`mi_runtime.scheduling`. Only what a model would draw is made up: the last user message, or a raw
prompt, is a command.

    say TEXT      TEXT, then end-of-sequence        lambda      the λ of the request
    request       dial, answer's dial and think policy, as JSON
    forever       `a` until max_tokens or abort     sampling    some sampling fields, as JSON
    wait          nothing: stays in the queue       fail        two tokens, then an error
    reject        the engine refuses the request
    die           three tokens, then the process    wedge       three tokens, then the process
                  exits with code 7                             stops reading and sending

Where the grammar of an answer does not allow a token of the script, the answer follows the grammar
on a short way to its end. Commands that describe the request ignore its grammar, so that tests can
read it.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, cycle, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tokenizers import Tokenizer

from mi_runtime.config import EngineConfig
from mi_runtime.request import (
    Abort,
    EngineInfo,
    EngineRequest,
    EngineStats,
    FinishReason,
    LoadFailed,
    Ready,
    RequestRejected,
    StepReport,
    Submit,
    TokenEvent,
    TokenLogprobs,
)
from mi_runtime.scheduling.block_pool import BlockPool
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.grammar import Grammars
from mi_runtime.scheduling.scheduler import Scheduler
from mi_runtime.scheduling.sequence import Sequence

USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
ENDLESS = ("forever", "fail", "die", "wedge")
DESCRIPTIONS = ("request", "sampling", "lambda")
FOREVER = 10**9
FILLERS = '}]"{:0,a'  # what completes JSON soon, best first, then any text
FINGERPRINT = "0123456789abcdef" * 4


class Script:
    """Holds the tokens that a sequence writes for its command."""

    def __init__(self, command: str, token_ids: list[int], eos: int) -> None:
        self.command = command
        self._tokens: Iterator[int] = (
            cycle(token_ids) if command in ENDLESS else chain(token_ids, repeat(eos))
        )

    def draw(self, sequence: Sequence, fillers: list[int]) -> int | None:
        """Returns the sequence's next token, or None if no token is allowed.

        Where the script's token is not allowed, it is the first of the `fillers` that is allowed.
        """
        if sequence.forced_token is not None:
            return sequence.forced_token
        written, forbidden = next(self._tokens), sequence.forbidden_token_ids
        grammar = sequence.constrained_by
        if grammar is None:
            return written if written not in forbidden else fillers[-1]
        allowed = sorted(allowed_token_ids(grammar.mask()) - forbidden)
        if written in allowed or written == grammar.extra_token:
            return written
        return next((token for token in fillers if token in allowed), next(iter(allowed), None))


def allowed_token_ids(mask: bytes) -> set[int]:
    """Returns the token ids whose bits are set in a grammar's mask."""
    return {8 * at + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1}


def describe_request(request: EngineRequest) -> dict[str, Any]:
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


def describe_sampling(request: EngineRequest) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "top_k": sampling.top_k,
        "eos": sorted(sampling.eos_token_ids),
    }


def answer_text(command: str, request: EngineRequest) -> str:
    if command.startswith("say "):
        return command.removeprefix("say ")
    match command:
        case "lambda":
            return f"{request.dial.reasoning_lambda:g}"
        case "request":
            return json.dumps(describe_request(request))
        case "sampling":
            return json.dumps(describe_sampling(request))
    return "a"


class FakeEngine:
    """Answers the commands of the pipe with the engine's scheduler and the scripts."""

    def __init__(
        self, pipe: Connection, config: EngineConfig, *, context: int, step_seconds: float
    ) -> None:
        self.pipe = pipe
        self.tokenizer = Tokenizer.from_file(str(Path(config.thinking) / "tokenizer.json"))
        (self.eos,) = self.encode("<|im_end|>")
        self.fillers = [self.eos, *self.encode(FILLERS)]
        self.marks = config.marks
        vocabulary = config.grammar_vocabulary
        self.grammars = None if vocabulary is None else Grammars(vocabulary)
        blocks_of_one = -(-context // config.block_size)
        self.scheduler = Scheduler(
            BlockPool(blocks_of_one * config.max_num_seqs, config.block_size, FINGERPRINT),
            vocab_size=self.tokenizer.get_vocab_size(),
            max_model_len=context,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            prefix_caching=config.prefix_caching,
        )
        self.step_seconds = step_seconds
        self.scripts: dict[str, Script] = {}  # by request id, of sequences that were scheduled
        self.held: dict[str, EngineRequest] = {}  # requests that say `wait`
        self.steps = 0

    @property
    def info(self) -> EngineInfo:
        scheduler = self.scheduler
        return EngineInfo(
            pair_identity="1" * 32,
            fingerprint=FINGERPRINT,
            model_type="fake",
            device="cpu",
            dtype="float32",
            delta_dtype="none",
            vocab_size=scheduler.vocab_size,
            max_model_len=scheduler.max_model_len,
            block_size=scheduler.blocks.block_size,
            num_blocks=scheduler.blocks.num_blocks,
            layers=4,
            weight_bytes=4_820_000,
            peak_bytes=9_000_000_000,
            load_seconds=0.0,
        )

    def encode(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return token_ids

    def serve(self) -> None:
        while True:
            try:
                self.read_commands()
            except EOFError:
                return
            if self.scheduler.unfinished:
                self.step()
                time.sleep(self.step_seconds)

    def read_commands(self) -> None:
        while self.pipe.poll(0 if self.scheduler.unfinished else None):
            match self.pipe.recv():
                case Submit(request):
                    self.submit(request)
                case Abort(request_id):
                    self.abort(request_id)

    def submit(self, request: EngineRequest) -> None:
        try:
            self.admit(request)
        except RequestRejected as error:
            end = TokenEvent(request.request_id, None, FinishReason.ERROR, error=error)
            self.report([end])

    def admit(self, request: EngineRequest) -> None:
        """Accepts a request as the engine does. Raises RequestRejected."""
        self.scheduler.check_request(request)
        if request.grammar is not None and self.grammars is None:
            raise RequestRejected("this server cannot enforce formats or tools", param="grammar")
        text = self.tokenizer.decode(list(request.prompt), skip_special_tokens=False)
        command = (USER_TURN.findall(text) or [text])[-1]
        if command == "reject":
            raise RequestRejected("the prompt says so", param="prompt")
        if command == "wait":
            self.held[request.request_id] = request
            self.report([])
        else:
            self.schedule(request, command)

    def schedule(self, request: EngineRequest, command: str) -> None:
        written = self.encode(answer_text(command, request))
        self.scripts[request.request_id] = Script(command, written, self.eos)
        if command in DESCRIPTIONS:
            request = replace(request, grammar=None)
        sequence = Sequence(request, self.marks, self.grammars)
        if sequence.grammar is not None:
            sequence.grammar.wait(10)
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        event = self.scheduler.abort(request_id)
        if self.held.pop(request_id, None) is not None:
            event = TokenEvent(request_id, None, FinishReason.ABORT)
        if event is not None:
            self.report([event])

    def step(self) -> None:
        self.steps += 1
        events = self.fail_on_command()
        chunks = self.scheduler.schedule()
        sampled = {}
        for chunk in chunks:
            if chunk.samples:
                token = self.scripts[chunk.sequence.request_id].draw(chunk.sequence, self.fillers)
                if token is None:
                    events.append(self.end_without_token(chunk.sequence))
                else:
                    sampled[chunk.sequence] = token, made_up_logprobs(chunk.sequence, token)
        scores = {
            chunk.sequence: made_up_prompt_logprobs(chunk) for chunk in chunks if chunk.scored
        }
        self.report(events + self.scheduler.update(chunks, sampled, scores))
        for sequence in self.scheduler.running:
            self.end_on_command(self.scripts[sequence.request_id].command, sequence)

    def fail_on_command(self) -> list[TokenEvent]:
        running = [
            sequence
            for sequence in self.scheduler.running
            if self.scripts[sequence.request_id].command == "fail" and sequence.output_length == 2
        ]
        return [self.scheduler.fail(sequence, "the prompt says so") for sequence in running]

    def end_without_token(self, sequence: Sequence) -> TokenEvent:
        assert sequence.grammar is not None
        if sequence.grammar.failure is not None:
            return self.scheduler.fail(sequence, sequence.grammar.failure)
        return self.scheduler.complete(sequence)

    def end_on_command(self, command: str, sequence: Sequence) -> None:
        if sequence.output_length == 3 and command == "die":
            os._exit(7)
        if sequence.output_length == 3 and command == "wedge":
            time.sleep(FOREVER)

    def report(self, events: list[TokenEvent]) -> None:
        scheduler = self.scheduler
        held = {request.dial.reasoning_lambda for request in self.held.values()}
        stats = EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self.held),
            used_blocks=scheduler.blocks.referenced,
            total_blocks=scheduler.blocks.num_blocks,
            running_lambdas=scheduler.running.lambdas,
            waiting_lambdas=tuple(sorted({*scheduler.waiting.lambdas, *held})),
            prefix_queried_tokens=scheduler.prefix_queried_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            steps=self.steps,
            pair_executions=self.steps,
            forced_closes=scheduler.forced_closes,
        )
        self.pipe.send(StepReport(tuple(events), stats))


def made_up_logprobs(sequence: Sequence, token: int) -> TokenLogprobs | None:
    count = sequence.request.sampling.logprobs
    if count is None:
        return None
    return TokenLogprobs(-0.5, tuple((token + i, -0.5 - i) for i in range(count)))


def made_up_prompt_logprobs(chunk: Chunk) -> list[TokenLogprobs]:
    """Returns -1, -2, … for the prompt's tokens from the second on, each ranked first."""
    prompt, count = chunk.sequence.request.prompt, chunk.sequence.request.sampling.prompt_logprobs
    assert count is not None
    return [
        TokenLogprobs(-at, tuple((prompt[at] + rank, -at - rank) for rank in range(count)))
        for at in (position + 1 for position in chunk.scored)
    ]


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
            return  # the server ended
    if arguments.fail_load:
        pipe.send(LoadFailed(arguments.fail_load))
        sys.exit(2)
    context = config.max_model_len or arguments.context
    engine = FakeEngine(pipe, config, context=context, step_seconds=arguments.step_seconds)
    pipe.send(Ready(engine.info))
    with suppress(BrokenPipeError):
        engine.serve()


if __name__ == "__main__":
    main()
