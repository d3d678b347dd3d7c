"""Writes a random pair of real shapes to disk, with configs, tokenizer and template.

Weights are drawn on their device and written to safetensors shards, one thread for each shard,
through one small buffer for each thread. So a file system in memory takes the size of the files and
hardly more. The models stay in memory: an engine in this process need not load them from the files.

The tokenizer is the embedded pair's, with made-up words for all other ids: a space and four
letters, each one token in both directions. The rows of the head for all tokens that are not such
words are made small, so that greedy answers consist of words: they do not end early, open no think
block, and split no character, and each token is text by itself.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from bench.measuring.device import synchronize
from bench.models.random_pair import Place, random_endpoint, random_thinking
from bench.models.shapes import Shape
from mi_runtime.device.memory import free_bytes
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from mi_runtime.embedded_pair.tokenizer import TURN_END

MEMORY: Final = Path("/dev/shm")
SHARDS: Final = 8  # shards of an endpoint, at most
PIECE: Final = 64 << 20  # bytes copied from the device to the file at once
QUIET: Final = 0.1  # scale of the head's rows for tokens that must not be generated
LETTERS: Final = 4  # letters of a made-up word: 456,976 words
DTYPES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True, slots=True)
class WrittenPair:
    """Both endpoints, in memory and as directories."""

    instruct: PreTrainedModel
    thinking: PreTrainedModel
    directories: tuple[Path, Path]
    bytes: int  # bytes of all weights
    seconds_made: float
    seconds_written: float


def folder_with_room(size: int) -> Path | None:
    """Returns a folder with room for so many bytes, or None.

    It is in memory if as much memory stays free, and otherwise on disk.
    """
    if MEMORY.is_dir() and min(_room(MEMORY), free_bytes(torch.device("cpu")) // 2) > size:
        return MEMORY
    disk = Path(tempfile.gettempdir())
    return disk if _room(disk) > size else None


def bytes_of_pair(shape: Shape, dtype: torch.dtype) -> int:
    """Returns the bytes of its matrices, and a little more for norms and tokenizers."""
    return 2 * shape.weights * dtype.itemsize + (64 << 20)


def write_pair(shape: Shape, place: Place, folder: Path) -> WrittenPair:
    """Makes the pair and writes it into `folder`."""
    started = time.perf_counter()
    instruct = random_endpoint(shape, place)
    thinking = random_thinking(shape, instruct, place)
    tokenizer = made_up_tokenizer(shape.vocabulary)
    words = range(*_ids_of_words(tokenizer))
    for endpoint in (instruct, thinking):
        say_only(endpoint, words)
    synchronize(place.device)
    made = time.perf_counter()
    directories = folder / "instruct", folder / "thinking"
    shards: list[tuple[Path, dict[str, Tensor]]] = []
    for endpoint, embedded, directory in zip(
        (instruct, thinking), (INSTRUCT_DIRECTORY, THINKING_DIRECTORY), directories, strict=True
    ):
        directory.mkdir()
        _write_texts(endpoint, embedded, tokenizer, directory)
        shards += plan_shards(endpoint, directory)
    with ThreadPoolExecutor(min(len(shards), os.cpu_count() or 1)) as threads:
        list(threads.map(lambda shard: write_shard(*shard), shards))
    size = sum(tensor.nbytes for _, tensors in shards for tensor in tensors.values())
    return WrittenPair(
        instruct, thinking, directories, size, made - started, time.perf_counter() - made
    )


# --- Weights --------------------------------------------------------------------------------------


def plan_shards(model: PreTrainedModel, directory: Path) -> list[tuple[Path, dict[str, Tensor]]]:
    """Returns the files with their tensors, and writes the index. A tied matrix is in one file."""
    tensors = dict(model.named_parameters())
    count = min(SHARDS, len(tensors))
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    files = {tensor: names[index % count] for index, tensor in enumerate(tensors)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    _write_json(directory / "model.safetensors.index.json", index)
    return [
        (directory / name, {one: tensors[one] for one, file in files.items() if file == name})
        for name in names
    ]


@torch.no_grad()
def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file: length of the header, header, numbers."""
    header = _header(tensors)
    device = next(iter(tensors.values())).device
    buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda")
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            for piece in tensor.flatten().view(torch.uint8).split(PIECE):  # type: ignore[no-untyped-call]
                part = buffer[: len(piece)].copy_(piece)
                file.write(part.numpy().data)


def _header(tensors: dict[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)


@torch.no_grad()
def say_only(model: PreTrainedModel, words: range) -> None:
    """Makes the logits of all tokens but `words` small; if the head is tied, embeddings too."""
    head = model.get_output_embeddings().weight
    head[: words.start].mul_(QUIET)
    head[words.stop :].mul_(QUIET)


def drop_weights(pair: WrittenPair) -> None:
    """Removes the weight files, which occupy memory, once a server has loaded them."""
    for directory in pair.directories:
        for path in directory.glob("*.safetensors"):
            path.unlink()


# --- Texts ----------------------------------------------------------------------------------------


def made_up_tokenizer(size: int) -> dict[str, Any]:
    """Returns a `tokenizer.json` of so many ids: the embedded pair's, with words before its end.

    No merge spells a word. Encoding finds a word as one token, because it is split off before
    (`ignore_merges`).
    """
    content: dict[str, Any] = json.loads((INSTRUCT_DIRECTORY / "tokenizer.json").read_text())
    vocabulary, added = content["model"]["vocab"], content["added_tokens"]
    for word in islice(made_up_words(), size - len(vocabulary) - len(added)):
        vocabulary[f"Ġ{word}"] = len(vocabulary)
    assert len(vocabulary) + len(added) == size
    for index, token in enumerate(added, len(vocabulary)):
        token["id"] = index
    content["model"]["ignore_merges"] = True
    return content


def made_up_words() -> Iterator[str]:
    return map("".join, product(ascii_lowercase, repeat=LETTERS))


def _ids_of_words(tokenizer: dict[str, Any]) -> tuple[int, int]:
    vocabulary = tokenizer["model"]["vocab"]
    return vocabulary[f"Ġ{next(made_up_words())}"], len(vocabulary)


def _write_texts(
    model: PreTrainedModel, embedded: Path, tokenizer: dict[str, Any], directory: Path
) -> None:
    """Writes all files that are not weights."""
    model.config.save_pretrained(directory)
    (end,) = (token["id"] for token in tokenizer["added_tokens"] if token["content"] == TURN_END)
    GenerationConfig(eos_token_id=end).save_pretrained(directory)
    _write_json(directory / "tokenizer.json", tokenizer)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded / name, directory / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _room(folder: Path) -> int:
    return shutil.disk_usage(folder).free
