"""Breaks lines of the code on purpose, one at a time, and checks that a test fails for each.

    python -m tests.mutations [NAME …]

Works in a copy of the files that git knows. A mutation whose line no longer exists is an error, and
so is one that every test survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Mutation:
    """One broken line, and the tests that should notice."""

    path: str
    line: str  # a part of it that occurs once in the file
    broken: str
    tests: tuple[str, ...]


MUTATIONS = {
    "scheduler: the first sequence is preempted": Mutation(
        "mi_runtime/scheduling/scheduler.py",
        "self._preempt(self.running.last)",
        "self._preempt(self.running.first)",
        ("tests/runtime/scheduling/test_scheduler.py",),
    ),
    "scheduler: an answer is one token too long": Mutation(
        "mi_runtime/scheduling/scheduler.py",
        "length == sequence.max_length\n",
        "length == sequence.max_length + 1\n",
        ("tests/runtime/scheduling/test_scheduler.py",),
    ),
    "blocks: the prefix cache ignores λ": Mutation(
        "mi_runtime/scheduling/block_pool.py",
        "repr((self._fingerprint, dial, cache_salt))",
        "repr((self._fingerprint, cache_salt))",
        (
            "tests/runtime/scheduling/test_scheduler.py",
            "tests/runtime/scheduling/test_block_pool.py",
        ),
    ),
    "blocks: cached blocks are counted as available twice": Mutation(
        "mi_runtime/scheduling/block_pool.py",
        "if revived + fresh > self.available:",
        "if fresh > self.available:",
        ("tests/runtime/scheduling/test_block_pool.py",),
    ),
    "blend: experts have λ = 0.9": Mutation(
        "mi_runtime/model/weights.py",
        'as the endpoints are."""\n        return torch.lerp(*self.endpoints, value, out=out)',
        'as the endpoints are."""\n        return torch.lerp(*self.endpoints, 0.9, out=out)',
        ("tests/runtime/model/test_pair_modules.py", "tests/runtime/execution/test_ways.py"),
    ),
    "blend: embeddings have the λ of another row": Mutation(
        "mi_runtime/model/weights.py",
        "blend = torch.lerp(instruct.float(), thinking.float(), rows.lambdas.unsqueeze(-1))",
        "blend = torch.lerp(instruct.float(), thinking.float(), rows.lambdas[:1].unsqueeze(-1))",
        ("tests/runtime/model/test_pair_modules.py",),
    ),
    "blend cache: the λ used last is evicted": Mutation(
        "mi_runtime/model/blend_cache.py",
        "blends.popitem(last=False)",
        "blends.popitem(last=True)",
        ("tests/runtime/model/test_blend_cache.py",),
    ),
    "planner: weights are built too late": Mutation(
        "mi_runtime/scheduling/planner.py",
        "savings.seconds >= price and",
        "savings.seconds >= 2 * price and",
        ("tests/runtime/scheduling/test_planner.py",),
    ),
    "planner: weights in use are evicted": Mutation(
        "mi_runtime/scheduling/planner.py",
        "return next(iter(self._built.values())) < savings.since",
        "return True",
        ("tests/runtime/scheduling/test_planner.py",),
    ),
    "sampler: two requests share a random number": Mutation(
        "mi_runtime/execution/random_sampling.py",
        "one.request.sampling, one.rng.random())",
        "one.request.sampling, 0.5)",
        ("tests/runtime/execution/test_sampler.py",),
    ),
    "sampler: greedy rows are not greedy": Mutation(
        "mi_runtime/execution/sampler.py",
        "logits.argmax(1) if greedy",
        "logits.argmin(1) if greedy",
        ("tests/runtime/execution/test_sampler.py",),
    ),
    "sampler: a request field is ignored": Mutation(
        "mi_runtime/scheduling/sequence.py",
        "params.min_tokens > 0",
        "False",
        ("tests/runtime/test_request_fields.py",),
    ),
    "deltas: int4 is off by one step": Mutation(
        "mi_runtime/model/delta.py",
        ".view(torch.int8).sub_(8)",
        ".view(torch.int8).sub_(7)",
        ("tests/runtime/model/test_delta.py",),
    ),
    "deltas: int8 rounds down": Mutation(
        "mi_runtime/model/delta.py",
        "(difference / _divisor(scales)).round()",
        "(difference / _divisor(scales)).floor()",
        ("tests/runtime/model/test_delta.py",),
    ),
    "grammar: the mask is that of the first token": Mutation(
        "mi_runtime/scheduling/grammar.py",
        "if matcher is not None and not matcher.consume_token(token_id):",
        "if matcher is None:",
        ("tests/runtime/scheduling/test_grammar.py",),
    ),
    "think block: events say it is never closed": Mutation(
        "mi_runtime/scheduling/scheduler.py",
        "phase=0 if thinking is None else int(thinking.phase)",
        "phase=0 if thinking is None else min(1, int(thinking.phase))",
        ("tests/runtime/scheduling/test_thinking.py", "tests/server/api/test_app.py"),
    ),
    "splitter: the closing tag is reasoning": Mutation(
        "server/text/reasoning_parser.py",
        "return self._sides.close(text.removesuffix(self._tag_of(event)))",
        "return self._sides.close(text)",
        ("tests/server/text",),
    ),
    "router: a budget must exceed the p90": Mutation(
        "server/routing/routing_table.py",
        "bisect_right(self._p90s, tokens)",
        "bisect_left(self._p90s, tokens)",
        ("tests/server/routing",),
    ),
    "router: the worst that fits is chosen": Mutation(
        "server/routing/routing_table.py",
        "return other if other.score > one.score else one",
        "return other if other.score < one.score else one",
        ("tests/server/routing",),
    ),
    "quota: answers are not charged": Mutation(
        "server/answer/answer.py",
        "self._charge(self.completion_tokens)",
        "self._charge(0)",
        ("tests/server/access",),
    ),
    "quota: the last token of a minute is refused": Mutation(
        "server/access/rate_limits.py",
        "if missing >= MINUTE:",
        "if missing > 0:",
        ("tests/server/access",),
    ),
    "rejections: the client does not hear which field": Mutation(
        "mi_runtime/worker.py",
        "FinishReason.ERROR, error=error)",
        "FinishReason.ERROR, error=str(error))",
        ("tests/runtime/test_worker.py",),
    ),
    "tools: a call that was cut counts as complete": Mutation(
        "server/text/tool_parser.py",
        "return self.count > 0 and self._state is not _State.ARGUMENTS",
        "return self.count > 0",
        ("tests/server/text", "tests/server/answer", "tests/server/api/test_app_tools.py"),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="beginnings of names; all if none is given")
    names = tuple(parser.parse_args().names) or ("",)
    chosen = {name: one for name, one in MUTATIONS.items() if name.startswith(names)}
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(Path(folder))
        survived = [name for name, one in chosen.items() if not is_caught(name, one, Path(folder))]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutations caught")
    return 1 if survived or not chosen else 0


def copy_checkout(folder: Path) -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    for name in files.stdout.decode().splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)


def is_caught(name: str, mutation: Mutation, folder: Path) -> bool:
    """Runs the tests on the broken line, prints which one failed, and restores the line."""
    path = folder / mutation.path
    intact = path.read_text(encoding="utf-8")
    assert intact.count(mutation.line) == 1, f"{mutation.path}: {mutation.line!r} is not there once"
    path.write_text(intact.replace(mutation.line, mutation.broken), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *mutation.tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    path.write_text(intact, encoding="utf-8")
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"{name}: {failures[0].partition(' - ')[0] if failures else 'SURVIVED'}", flush=True)
    return done.returncode == 1


if __name__ == "__main__":
    sys.exit(main())
