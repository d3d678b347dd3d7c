"""Measures what a grammar costs: masks, compilation, and reading the vocabulary.

    python -m bench.grammar [--answers 8]

Uses the embedded pair's tokenizer, and a made-up one of 151,936 tokens (byte level, random words).
Answers are drawn uniformly from what the grammar allows, so that masks are computed at every kind
of position. All rows are in microseconds: `mask` computes one row's mask at one step, and `apply`
changes that row's logits.
"""

import argparse
import random
import string
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bench.measuring.publishing import publish
from mi_runtime.config import GrammarVocabulary
from mi_runtime.embedded_pair.tokenizer import build_tokenizer
from mi_runtime.execution.sampler import Sampler
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.scheduling.grammar import Grammars, GrammarState
from mi_runtime.scheduling.sequence import Sequence

END = "<|im_end|>"
LARGE = 151_936  # Qwen3's
ROWS = 8
LONGEST = 400  # tokens of an answer
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "record": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
            "kind": {"enum": ["person", "place", "thing"]},
            "where": {
                "type": "object",
                "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}},
                "required": ["lat", "lon"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "age", "tags", "kind", "where"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=8, help="for each schema and vocabulary")
    answers = parser.parse_args().answers
    torch.set_num_threads(1)
    values: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, tokenizer in (("embedded", build_tokenizer()), ("151,936 tokens", made_up())):
            path = Path(directory) / f"{len(values)}.json"
            tokenizer.save(str(path))
            values |= rows(name, tokenizer, path, answers)
    masks = {row: median(one) for row, one in values.items() if "mask" in row}
    publish("grammar", "µs", values, {f"{row}, µs": value for row, value in masks.items()})


def made_up() -> Tokenizer:
    """Makes a tokenizer of bytes, random words of up to ten letters, and the end token."""
    generator = random.Random(0)
    symbols = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(symbols) < LARGE - 1:
        letters = "".join(generator.choices(string.ascii_lowercase, k=generator.randint(1, 10)))
        symbols[generator.choice(("", "Ġ")) + letters] = None
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


def rows(name: str, tokenizer: Tokenizer, path: Path, answers: int) -> dict[str, list[float]]:
    end = tokenizer.token_to_id(END)
    assert end is not None
    started = time.perf_counter()
    grammars = Grammars(GrammarVocabulary(str(path), (end,)))
    grammars.state("start: /a/", None).mask()
    values = {f"{name}: vocabulary": [microseconds(started)]}
    for kind, schema in SCHEMAS.items():
        source = LLMatcher.grammar_from_json_schema(schema)
        started = time.perf_counter()
        grammars.state(source, None).mask()
        values[f"{name}, {kind}: compile and first mask"] = [microseconds(started)]
        generator = random.Random(0)
        timed = [
            one
            for _ in range(answers)
            for one in drawn(grammars.state(source, None), end, generator)
        ]
        values[f"{name}, {kind}: mask"] = timed
        values[f"{name}, {kind}: apply"] = applied(
            grammars, source, tokenizer.get_vocab_size(), answers
        )
    return values


def drawn(state: GrammarState, end: int, generator: random.Random) -> Iterator[float]:
    """Draws an answer, and returns the time of each mask."""
    for _ in range(LONGEST):
        started = time.perf_counter()
        mask = state.mask()
        yield microseconds(started)
        allowed = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
        byte = generator.choice(allowed.nonzero().flatten().tolist())
        bits = [bit for bit in range(8) if mask[byte] >> bit & 1]
        token = byte * 8 + generator.choice(bits)
        if token == end:
            return
        state.observe(token)
        if state.complete:
            return


def applied(grammars: Grammars, source: str, vocabulary: int, rounds: int) -> list[float]:
    """Returns the time of a row of a greedy step with the grammar, minus that without one."""
    times: dict[str | None, list[float]] = {source: [], None: []}
    for _ in range(rounds + 1):
        for grammar, measured in times.items():
            sequences = tuple(sequence(grammars, grammar) for _ in range(ROWS))
            for one in sequences:
                if one.grammar is not None:
                    one.grammar.mask()  # the first one takes longer
            logits = torch.randn(ROWS, vocabulary)
            started = time.perf_counter()
            Sampler().sample(logits, sequences)
            measured.append(microseconds(started) / ROWS)
    pairs = zip(times[source][1:], times[None][1:], strict=True)
    return [held - free for held, free in pairs]


def sequence(grammars: Grammars, grammar: str | None) -> Sequence:
    request = EngineRequest("r", (0,), Dial(0.5), SamplingParams(temperature=0.0), grammar=grammar)
    return Sequence(request, None, grammars)


def microseconds(since: float) -> float:
    return (time.perf_counter() - since) * 1e6


if __name__ == "__main__":
    main()
