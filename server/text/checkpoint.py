"""Reads the text side of an endpoint on disk: directory, chat template and sampling defaults.

A hub id is resolved to a local directory here, once, and the engine gets that directory. Weights
are read elsewhere, and code of a checkpoint is never run.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from server.exit_codes import CommandError

HUB_PATTERNS: Final = ("*.json", "*.jinja", "*.safetensors")


class CheckpointError(CommandError):
    """The endpoint cannot be served."""


def local_directory(name: str) -> Path:
    """Returns the directory of an endpoint; downloads it if `name` is a hub id.

    Raises `CheckpointError`.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such directory, and not a hub id (OWNER/NAME)")
    # Imported here, because it takes a third of a second that a local endpoint does not need.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except (OSError, ValueError) as error:  # no network, no such repository, not a valid id
        raise CheckpointError(
            f"{name}: no such directory, and the hub did not provide it: {error}"
        ) from error


@dataclass(frozen=True, slots=True)
class EndpointText:
    """What the HTTP process knows about one endpoint, besides its tokenizer."""

    directory: Path
    chat_template: str
    special_tokens: dict[str, str]  # bos_token, eos_token, …: variables of the template
    eos_token_ids: frozenset[int]
    generation_config: dict[str, Any] = field(default_factory=dict)  # has the sampling defaults

    @classmethod
    def read(cls, directory: Path) -> "EndpointText":
        """Reads the files of a checkpoint. Raises `CheckpointError`."""
        config = read_json(directory / "tokenizer_config.json")
        generation = read_json(directory / "generation_config.json")
        return cls(
            directory=directory,
            chat_template=_chat_template(directory, config),
            special_tokens=_special_tokens(config),
            eos_token_ids=eos_token_ids_of(generation),
            generation_config=generation,
        )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in the file, or an empty one without the file.

    Raises `CheckpointError`.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _chat_template(directory: Path, config: dict[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # of named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{directory}: no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json)"
        )
    return template


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Returns tokens by role; a config has them as text, or as objects with text in `content`."""
    tokens = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[role] = token
    return tokens


def eos_token_ids_of(generation: dict[str, Any]) -> frozenset[int]:
    """Returns the tokens that end an answer, from the content of `generation_config.json`."""
    ids = generation.get("eos_token_id")
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
