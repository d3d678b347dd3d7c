"""An endpoint's text files are read wherever they stand, and a broken or missing one is named."""

import json
from pathlib import Path

import pytest

from server.text.checkpoint import CheckpointError, EndpointText, local_directory
from server.text.prompt import PromptBuilder


def write_checkpoint(directory: Path, **files: object) -> Path:
    for name, content in files.items():
        path = directory / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_a_template_may_stand_in_the_tokenizer_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer_config={"chat_template": "T", "bos_token": "<s>"})
    read = EndpointText.read(tmp_path)
    assert (read.chat_template, read.special_tokens) == ("T", {"bos_token": "<s>"})


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    config = {"chat_template": named, "eos_token": {"content": "</s>", "lstrip": False}}
    write_checkpoint(tmp_path, tokenizer_config=config)
    read = EndpointText.read(tmp_path)
    assert (read.chat_template, read.special_tokens) == ("B", {"eos_token": "</s>"})


def test_the_generation_config_is_read_and_names_the_ends(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path,
        tokenizer_config={"chat_template": "T"},
        generation_config={"temperature": 0.6, "top_k": 20, "eos_token_id": 7, "max_length": 9},
    )
    read = EndpointText.read(tmp_path)
    assert (read.generation_config["temperature"], read.generation_config["top_k"]) == (0.6, 20)
    assert read.eos_token_ids == {7}


def test_a_checkpoint_without_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no chat template"):
        EndpointText.read(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tokenizer_config="{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        EndpointText.read(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/place", "./here", "no-slash", "a/b/c"])
def test_a_directory_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        local_directory(name)


def test_an_existing_directory_is_used_unchanged(tmp_path: Path) -> None:
    assert local_directory(str(tmp_path)) == tmp_path.resolve()


def test_a_hub_id_downloads_weights_and_text_but_no_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    downloads: list[tuple[str, list[str]]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        downloads.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert local_directory("owner/pair") == tmp_path
    ((name, patterns),) = downloads
    assert name == "owner/pair"
    assert "*.safetensors" in patterns
    assert not {"*", "*.bin", "*.py", "*.pt"} & set(patterns)


def test_a_checkpoint_without_tokenizer_json_says_what_to_do(
    tmp_path: Path, instruct_directory: Path
) -> None:
    write_checkpoint(tmp_path, tokenizer_config={"chat_template": "T"})
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        PromptBuilder(EndpointText.read(instruct_directory), EndpointText.read(tmp_path))
