"""Checks that two checkpoint directories form a pair, before any weight is loaded.

It reads configs, safetensors headers and tokenizer files, and collects every mismatch in one
message. Configs must be equal except for the keys below, which do not affect how a token is
computed.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from mi_runtime.config import DeltaDtype
from mi_runtime.errors import PairError

IGNORED_CONFIG_KEYS = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_position_embeddings",  # the smaller one limits the context; rope does not use it
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "embd_pdrop",
        "resid_pdrop",
        "residual_dropout",
        "embedding_dropout",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "output_router_logits",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "id2label",
        "label2id",
        "problem_type",
        "max_window_layers",  # only used to derive layer_types, which is compared
    }
)
SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
BATCH_WIDE_ROPE = frozenset({"dynamic", "longrope"})  # frequencies depend on the entire batch
FINGERPRINT_SAMPLES = 64  # pieces of every weight file in the fingerprint
FINGERPRINT_PIECE = 4096  # bytes per piece


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The shape and dtype of a checkpoint tensor, from its file's header."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint directory: its config, and the tensors in its weight files."""

    directory: Path
    config: PreTrainedConfig
    raw_config: dict[str, Any]  # the content of config.json
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two endpoints that may be blended."""

    instruct: Checkpoint
    thinking: Checkpoint

    @property
    def max_positions(self) -> int:
        """The tokens of context that both endpoints support."""
        return min(
            int(endpoint.config.max_position_embeddings)
            for endpoint in (self.instruct, self.thinking)
        )

    def identity(self) -> str:
        """Returns a hex digest of both endpoints' configs and of samples of their weight files."""
        digest = hashlib.blake2b(digest_size=16)
        for endpoint in (self.instruct, self.thinking):
            digest.update(json.dumps(_computation(endpoint.raw_config), sort_keys=True).encode())
            for path in endpoint.files:
                _sample_file(path, digest)
        return digest.hexdigest()


def fingerprint(identity: str, lambda_step: float, delta_dtype: DeltaDtype) -> str:
    """Returns a hex digest of all that KV and answers depend on besides the dial.

    That is the pair, the λ grid, and how the pair is stored.
    """
    content = f"{identity} {lambda_step} {delta_dtype}"
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def check_pair(instruct: str | Path, thinking: str | Path) -> Pair:
    """Returns both directories as a pair. Raises PairError with every reason that prevents it."""
    problems: list[str] = []
    endpoints = [_read_checkpoint(Path(directory), problems) for directory in (instruct, thinking)]
    if problems or endpoints[0] is None or endpoints[1] is None:
        raise PairError(problems)
    pair = Pair(endpoints[0], endpoints[1])
    problems += _unsupported(pair.instruct.config)
    problems += _config_mismatches(pair)
    problems += _tensor_mismatches(pair)
    problems += _tokenizer_mismatches(pair)
    if problems:
        raise PairError(problems)
    return pair


def check_base(directory: str | Path, pair: Pair) -> Checkpoint:
    """Returns the checkpoint from which both endpoints were fine-tuned.

    Only its tensors are checked, since a base may have another context length. Raises PairError if
    they do not match those of the pair.
    """
    problems: list[str] = []
    base = _read_checkpoint(Path(directory), problems)
    if base is not None:
        names = base.tensors.keys() ^ pair.instruct.tensors.keys()
        problems += [f"tensor {name}: only in the base or only in the pair" for name in names]
        problems += [
            f"tensor {name}: the base has shape {base.tensors[name].shape}, the pair {it.shape}"
            for name, it in pair.instruct.tensors.items()
            if name in base.tensors and base.tensors[name].shape != it.shape
        ]
    if problems or base is None:
        raise PairError(sorted(problems))
    return base


def _read_checkpoint(directory: Path, problems: list[str]) -> Checkpoint | None:
    """Reads a checkpoint directory; adds to `problems`, and returns None without a config."""
    if not directory.is_dir():
        problems.append(f"{directory}: no such directory")
        return None
    configs = _read_config(directory, problems)
    files = _weight_files(directory, problems)
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        try:
            tensors.update(_read_header(path))
        except (SafetensorError, OSError) as error:
            problems.append(f"{path}: not a readable safetensors file ({error})")
    if configs is None:
        return None
    return Checkpoint(directory, *configs, tuple(files), tensors)


def _read_config(
    directory: Path, problems: list[str]
) -> tuple[PreTrainedConfig, dict[str, Any]] | None:
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if "auto_map" in raw:
            problems.append(
                f"{path}: its model class is remote code (auto_map), which is never run"
            )
            return None
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        problems.append(f"{path}: not a readable model config ({_first_line(error)})")
        return None
    return config, raw


def _weight_files(directory: Path, problems: list[str]) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{index}: not a readable index ({_first_line(error)})")
            return []
        missing = [name for name in names if not (directory / name).is_file()]
        problems += [
            f"{directory / name}: listed in {index.name}, but the file does not exist"
            for name in missing
        ]
        return [directory / name for name in names if name not in missing]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    problems.append(f"{directory}: no model.safetensors and no {index.name}")
    return []


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads names, shapes and dtypes. Raises SafetensorError if the file is truncated."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: TensorInfo(tuple(piece.get_shape()), str(piece.get_dtype()))
            for name, piece in slices.items()
        }


def _unsupported(config: PreTrainedConfig) -> list[str]:
    """Returns the parts of a model that a mixed batch cannot compute, by config key."""
    values = config.to_dict()
    problems = []
    rope = sorted(_rope_types(values) & BATCH_WIDE_ROPE)
    if rope:
        problems.append(
            f"rope_type {rope[0]!r} is not supported: it depends on the longest sequence in the "
            "batch"
        )
    if values.get("attn_logit_softcapping") is not None:
        problems.append("attn_logit_softcapping (gemma2) is not supported")
    if values.get("kv_lora_rank") is not None:
        problems.append("multi-head latent attention (kv_lora_rank) is not supported")
    layers = sorted(set(values.get("layer_types") or ()) - SUPPORTED_LAYER_TYPES)
    if layers:
        problems.append(f"layer_types {', '.join(layers)} are not supported")
    if any(key in values for key in ("ssm_cfg", "mamba_d_state", "state_size", "mamba_d_conv")):
        problems.append(f"state-space layers (model_type {config.model_type}) are not supported")
    for key in ("quantization_config", "text_config"):
        if values.get(key) is not None:
            problems.append(f"{key}: quantized and multimodal checkpoints are not supported")
    if values.get("is_encoder_decoder"):
        problems.append("is_encoder_decoder: only decoder models are supported")
    return problems


def _rope_types(value: Any) -> set[str]:
    """Returns every rope type in a config, at any depth: some models have one per layer type."""
    if not isinstance(value, dict):
        return set()
    own = {str(value[key]) for key in ("rope_type", "type") if isinstance(value.get(key), str)}
    return own.union(*map(_rope_types, value.values()))


def _computation(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a config that affects how a token is computed, as JSON values."""
    values = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _config_mismatches(pair: Pair) -> list[str]:
    instruct, thinking = (
        _computation(one.config.to_dict()) for one in (pair.instruct, pair.thinking)
    )
    absent = "absent"
    return [
        f"config {key}: instruct has {instruct.get(key, absent)!r}, "
        f"thinking has {thinking.get(key, absent)!r}"
        for key in sorted(instruct.keys() | thinking.keys())
        if instruct.get(key, absent) != thinking.get(key, absent)
    ]


def _tensor_mismatches(pair: Pair) -> list[str]:
    instruct, thinking = pair.instruct.tensors, pair.thinking.tensors
    problems = [f"tensor {name}: only in instruct" for name in sorted(instruct.keys() - thinking)]
    problems += [f"tensor {name}: only in thinking" for name in sorted(thinking.keys() - instruct)]
    problems += [
        f"tensor {name}: instruct has shape {instruct[name].shape}, thinking {thinking[name].shape}"
        for name in sorted(instruct.keys() & thinking)
        if instruct[name].shape != thinking[name].shape
    ]
    return problems


def _tokenizer_mismatches(pair: Pair) -> list[str]:
    """Returns where token ids differ in meaning; chat templates may differ."""
    problems: list[str] = []
    contents = [
        _read_tokenizer(one.directory / "tokenizer.json", problems)
        for one in (pair.instruct, pair.thinking)
    ]
    if contents[0] is None or contents[1] is None:
        return problems
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer"):
        if contents[0].get(part) != contents[1].get(part):
            problems.append(f"tokenizer.json {part}: differs between the endpoints")
    return problems


def _read_tokenizer(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        problems.append(f"{path}: not a readable tokenizer ({_first_line(error)})")
        return None
    return content


def _sample_file(path: Path, digest: hashlib.blake2b) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for piece in range(FINGERPRINT_SAMPLES):
            file.seek(piece * max(0, size - FINGERPRINT_PIECE) // (FINGERPRINT_SAMPLES - 1))
            digest.update(file.read(FINGERPRINT_PIECE))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
