"""Loads a checked pair into one `transformers` model with swapped modules.

`transformers` loads both endpoints (meta device first, then weights streamed from safetensors), so
they have the same fused layouts and ties. A probe forward pass over both records where every module
has its rows. The swap then moves the tensors of both into pair modules one by one. Finally the same
probe at mixed λ must give the logits that each endpoint gave alone; otherwise the model is refused.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, modeling_utils
from transformers.integrations.moe import ExpertsInterface

from mi_runtime.attention.paged import ATTENTION_NAME, attention_forward
from mi_runtime.config import DeltaDtype, Device, Dtype
from mi_runtime.device.memory import MemoryPeak, memory_given_back
from mi_runtime.errors import PairError, UnsupportedModel
from mi_runtime.kernels.dispatch import KernelDispatch
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.delta import DeltaStorage
from mi_runtime.model.pair_check import Checkpoint, Pair
from mi_runtime.model.pair_modules import pair_experts_forward, weights_of
from mi_runtime.model.probe import Probe, unique_tensors
from mi_runtime.model.row_lambdas import BlendGroups
from mi_runtime.model.swap import ModuleSwap
from mi_runtime.model.weights import PairStorage, Storage

EXPERTS_NAME = "mi_pair"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: Device) -> torch.device:
    """Returns the device; `auto` is a GPU if there is one. Raises PairError without CUDA."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise PairError(["--device cuda: this machine or this torch has no CUDA device"])
    return torch.device(device)


def resolve_dtype(dtype: Dtype, device: torch.device, pair: Pair) -> torch.dtype:
    """Returns the dtype; `auto` is float32 on a CPU, and Instruct's own on a GPU."""
    if dtype != "auto":
        return DTYPES[dtype]
    stored = pair.instruct.config.dtype
    return torch.float32 if device.type == "cpu" or stored is None else stored


@memory_given_back()
def load_pair(
    pair: Pair,
    device: Device = "auto",
    dtype: Dtype = "auto",
    delta_dtype: DeltaDtype = "none",
) -> BlendedModel:
    """Loads both endpoints of a pair and makes one model of them.

    With `delta_dtype`, Thinking is loaded on the CPU and moved to the device module by module.
    Raises PairError with the name of what cannot be served.
    """
    started = time.monotonic()
    where = resolve_device(device)
    memory = MemoryPeak(where)
    kind = resolve_dtype(dtype, where, pair)
    instruct = _load_checkpoint(pair.instruct, where, kind)
    memory.look()
    thinking_device = where if delta_dtype == "none" else torch.device("cpu")
    thinking = _load_checkpoint(pair.thinking, thinking_device, kind)
    memory.look()
    model = pair_up(instruct, thinking, pair.identity(), delta_dtype, memory)
    return replace(model, load_seconds=time.monotonic() - started)


def pair_up(
    instruct: PreTrainedModel,
    thinking: PreTrainedModel,
    identity: str,
    delta_dtype: DeltaDtype = "none",
    memory: MemoryPeak | None = None,
) -> BlendedModel:
    """Makes one model, on Instruct's device, of two that are in memory already.

    Both must have the same config and dtype. `instruct` becomes the model, and `thinking` is
    emptied. Raises PairError as `load_pair` does.
    """
    started = time.monotonic()
    ExpertsInterface.register(EXPERTS_NAME, pair_experts_forward)
    for endpoint in (instruct, thinking):
        use_paged_attention(endpoint)
    where, kind = instruct.device, instruct.dtype
    memory = memory or MemoryPeak(where)
    kernels = KernelDispatch()
    storage: Storage = (
        PairStorage(kernels) if delta_dtype == "none" else DeltaStorage(delta_dtype, kernels)
    )
    full_bytes = sum(tensor.nbytes for tensor in unique_tensors(instruct, thinking))
    probe = Probe.for_model(instruct)
    try:
        expected = probe.expected_logits(instruct, thinking)
        layers = int(instruct.config.num_hidden_layers)
        groups = BlendGroups(layers, where, BlendCache(), storage.endpoints)
        swap = ModuleSwap(groups, probe.axes, storage).swap(instruct, thinking)
        for _ in tqdm(swap, "Pairing modules", sum(1 for _ in instruct.modules()), disable=None):
            memory.look()
        instruct.config._experts_implementation = EXPERTS_NAME
        probe.check(instruct, groups, expected, kind, delta_dtype)
    except UnsupportedModel as error:
        raise PairError([f"model_type {instruct.config.model_type}: {error}"]) from error
    except torch.OutOfMemoryError as error:
        raise _too_large(error) from error
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:  # in the model's code
        reason = f"its forward does not run with pair modules ({type(error).__name__}: {error})"
        raise PairError([f"model_type {instruct.config.model_type}: {reason}"]) from error
    shapes = probe.attention.shapes
    return BlendedModel(
        model=instruct,
        groups=groups,
        kernels=kernels,
        layers=tuple(shapes[layer] for layer in range(len(shapes))),
        device=where,
        dtype=kind,
        vocab_size=int(instruct.config.vocab_size),
        weight_bytes=full_bytes - _saved_bytes(instruct),
        peak_bytes=memory.peak,
        load_seconds=time.monotonic() - started,
        identity=identity,
        max_positions=min(
            int(endpoint.config.max_position_embeddings) for endpoint in (instruct, thinking)
        ),
    )


def use_paged_attention(model: PreTrainedModel) -> None:
    """Makes the model use the engine's attention, in inference mode."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    # Torch 2.11 prefers cuDNN, which plans again for every new shape: here in nearly every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model.config._attn_implementation = ATTENTION_NAME
    model.eval().requires_grad_(False)


def load_static(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> PreTrainedModel:
    """Loads one checkpoint without pair modules, as a baseline for benchmarks."""
    return _load_checkpoint(checkpoint, resolve_device(device), dtype)


def _load_checkpoint(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Loads one checkpoint. Raises PairError with every missing, unknown or non-finite tensor."""
    # It must be registered before a config refers to it.
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    try:
        with tensors_allocated_separately():
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise _too_large(error) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PairError([f"{checkpoint.directory}: {error}"]) from error
    problems = [
        f"{checkpoint.directory}: {what}: {', '.join(map(str, sorted(report[what])))}"
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys")
        if report[what]
    ]
    problems += [
        f"{checkpoint.directory}: tensor {name} has values that are not finite"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not torch.isfinite(tensor).all()
    ]
    if problems:
        raise PairError(problems)
    assert isinstance(model, PreTrainedModel)
    use_paged_attention(model)
    return model


@contextmanager
def tensors_allocated_separately() -> Iterator[None]:
    """Makes `transformers` allocate GPU memory tensor by tensor, not one piece per model.

    The swap frees an endpoint tensor by tensor, and memory freed inside one large piece cannot be
    returned to the device: about 20 GiB for a pair of 30B-A3B's shapes, by a simulation of torch's
    allocator.
    """
    warm_up = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up


def _too_large(error: torch.OutOfMemoryError) -> PairError:
    reason = (str(error).splitlines() or [""])[0]
    return PairError([f"the pair does not fit in memory (try --delta-dtype): {reason}"])


def _saved_bytes(model: nn.Module) -> int:
    """Returns how many bytes fewer the pair takes than both full endpoints."""
    return sum(2 * one.instruct.nbytes - one.nbytes for one in weights_of(model))
