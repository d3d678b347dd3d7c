"""Loads a checked pair into one `transformers` model with swapped modules.

Both endpoints are loaded by `transformers` (meta device first, then the weights streamed from
safetensors), which gives them the same fused layouts and ties. A probe forward over both records
where every module has its rows; the swap then moves the tensors of both into pair modules one by
one, and the same probe at mixed λ must give back the logits that each endpoint gave by itself:
a model that this module does not understand is refused before it serves.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, modeling_utils
from transformers.integrations.moe import ExpertsInterface

from mi_runtime.attention.paged import (
    ATTENTION_NAME,
    LayerShape,
    PackedAttention,
    attention_forward,
)
from mi_runtime.config import DeltaDtype, Device, Dtype
from mi_runtime.device.memory import MemoryPeak, memory_given_back
from mi_runtime.errors import PairError, UnsupportedModel
from mi_runtime.kernels.choice import KernelChoice
from mi_runtime.model.blend import Storage, WholeStorage, pair_experts_forward, weights_of
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.delta import DeltaStorage
from mi_runtime.model.pair import Endpoint, Pair
from mi_runtime.model.rows import BlendGroups, StepRows
from mi_runtime.model.swap import ModuleSwap, RowAxis
from mi_runtime.request import Dial

EXPERTS_NAME = "mi_pair"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest error of the self-check, as a share of the largest logit (median over an endpoint's rows).
SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# And what rounding the difference may add to it for Thinking, as a share of how far the endpoints'
# logits lie apart.
DELTA_TOLERANCE: dict[DeltaDtype, float] = {"none": 0.0, "int8": 0.1, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class BlendedModel:
    """A model whose rows have a λ each, and what an engine must know of it."""

    model: PreTrainedModel
    groups: BlendGroups
    layers: tuple[LayerShape, ...]
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    weight_bytes: int  # of both endpoints, as they are kept
    peak_bytes: int  # most memory that loading held at once, pages of mapped files not counted
    load_seconds: float
    identity: str  # hex digest of configs and weights; of a pair that no file holds, any name
    max_positions: int  # tokens of context that both endpoints were made for
    kernels: KernelChoice = field(default_factory=KernelChoice)

    @torch.inference_mode()
    def logits(self, ids: Tensor, positions: Tensor, kept: Tensor, attention: Any) -> Tensor:
        """Logits `[kept, vocabulary]` of a flat batch; ids and positions are `[tokens]` int64."""
        logits = forward_logits(self.model, ids, positions, kept, attention)
        self.groups.end()
        return logits


def resolve_device(device: Device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise PairError(["--device cuda: this machine or this torch has no CUDA device"])
    return torch.device(device)


def resolve_dtype(dtype: Dtype, device: torch.device, pair: Pair) -> torch.dtype:
    """`auto` is float32 on a CPU, and what the Instruct checkpoint says on a GPU."""
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
    """Raises PairError with the name of what cannot be served.

    A pair whose difference is kept small is never whole on the device: Thinking is loaded on the
    CPU, and comes over module by module.
    """
    started = time.monotonic()
    where = resolve_device(device)
    memory = MemoryPeak(where)
    kind = resolve_dtype(dtype, where, pair)
    instruct = _load_endpoint(pair.instruct, where, kind)
    memory.look()
    thinking_device = where if delta_dtype == "none" else torch.device("cpu")
    thinking = _load_endpoint(pair.thinking, thinking_device, kind)
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
    """One model of two that are in memory already, of one config and dtype, on Instruct's device.

    Empties `thinking`, and `instruct` becomes the model. Raises PairError as `load_pair` does.
    """
    started = time.monotonic()
    ExpertsInterface.register(EXPERTS_NAME, pair_experts_forward)
    for endpoint in (instruct, thinking):
        use_paged_attention(endpoint)
    where, kind = instruct.device, instruct.dtype
    memory = memory or MemoryPeak(where)
    kernels = KernelChoice()
    storage: Storage = (
        WholeStorage(kernels) if delta_dtype == "none" else DeltaStorage(delta_dtype, kernels)
    )
    both_whole = sum(tensor.nbytes for tensor in _unique_tensors(instruct, thinking))
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
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:  # of the model's code
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
        weight_bytes=both_whole - _saved_bytes(instruct),
        peak_bytes=memory.peak,
        load_seconds=time.monotonic() - started,
        identity=identity,
        max_positions=min(
            int(endpoint.config.max_position_embeddings) for endpoint in (instruct, thinking)
        ),
    )


def use_paged_attention(model: PreTrainedModel) -> None:
    """Lets the engine's attention and no other serve the model, which only infers from now on."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    # Torch 2.11 takes cuDNN first, which plans for each shape anew: here nearly every step has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model.config._attn_implementation = ATTENTION_NAME
    model.eval().requires_grad_(False)


def load_static(endpoint: Endpoint, device: Device, dtype: torch.dtype) -> PreTrainedModel:
    """A plain checkpoint without any blend module, on the same attention: the bench's baseline."""
    return _load_endpoint(endpoint, resolve_device(device), dtype)


def _load_endpoint(endpoint: Endpoint, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    AttentionInterface.register(ATTENTION_NAME, attention_forward)  # a name must be there to be set
    try:
        with tensors_apart():
            model, report = AutoModelForCausalLM.from_pretrained(
                endpoint.directory,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # told below, by name
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise _too_large(error) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PairError([f"{endpoint.directory}: {error}"]) from error
    problems = [
        f"{endpoint.directory}: {what}: {', '.join(map(str, sorted(report[what])))}"
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys")
        if report[what]
    ]
    problems += [
        f"{endpoint.directory}: tensor {name} has values that are not finite"
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not torch.isfinite(tensor).all()
    ]
    if problems:
        raise PairError(problems)
    assert isinstance(model, PreTrainedModel)
    use_paged_attention(model)
    return model


@contextmanager
def tensors_apart() -> Iterator[None]:
    """Inside, `transformers` takes a GPU's memory tensor by tensor, not a model's in one piece.

    The swap frees an endpoint tensor by tensor, and what is left of one large piece is lost to
    everybody else: of a pair of 30B-A3B's shapes some 20 GiB, by a model of torch's allocator.
    """
    warm_up = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = warm_up


def _too_large(error: torch.OutOfMemoryError) -> PairError:
    said = (str(error).splitlines() or [""])[0]
    return PairError([f"the pair does not fit in memory (--delta-dtype keeps it smaller): {said}"])


def _saved_bytes(model: nn.Module) -> int:
    """What is kept less than both endpoints whole."""
    return sum(2 * one.instruct.nbytes - one.nbytes for one in weights_of(model))


def _unique_tensors(*models: nn.Module) -> Iterator[Tensor]:
    for model in models:
        yield from model.parameters()  # tied parameters come once
        yield from model.buffers()


def forward_logits(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, kept: Tensor, attention: Any
) -> Tensor:
    """`BlendedModel.logits` of a model, as one function that can be compiled."""
    output = model(
        input_ids=ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        logits_to_keep=kept,
        attention_context=attention,
    )
    logits: Tensor = output.logits[0]
    return logits


class Probe:
    """A small packed batch of two sequences that every model goes through at load.

    Its number of tokens, and that of its rows with logits, are primes which no dimension of the
    model equals: so each module's row axis can be read from the shape of its input.
    """

    def __init__(self, tokens: int, kept: int, vocab_size: int, device: torch.device) -> None:
        lengths = (tokens // 2, tokens - tokens // 2)
        self.axes: dict[str, RowAxis] = {}
        self.attention = PackedAttention(lengths)
        self._read = WeakTensorKeyDictionary()  # a number of each tensor that modules read
        self._numbers = count()
        self._tokens, self._kept_count = tokens, kept
        self._ids = torch.arange(1, tokens + 1, device=device) * 7 % vocab_size
        self._positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        self._kept = torch.linspace(0, tokens - 1, kept, device=device).round().long()
        self._endpoints = (torch.arange(tokens, device=device) >= lengths[0]).long()

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> "Probe":
        taken = {size for tensor in _unique_tensors(model) for size in tensor.shape}
        taken |= {value for value in model.config.to_dict().values() if isinstance(value, int)}
        free = (prime for prime in _PRIMES if prime not in taken)
        kept, tokens = next(free), next(free)
        return cls(tokens, kept, model.config.vocab_size, model.device)

    def expected_logits(self, instruct: PreTrainedModel, thinking: PreTrainedModel) -> Tensor:
        """`[2, kept, vocabulary]`: all rows by Instruct, and by Thinking, each where it lies."""
        with self._recording(instruct):
            first = self._logits(instruct)
        return torch.stack((first, self._logits(thinking, thinking.device).to(first.device)))

    def check(
        self,
        blended: PreTrainedModel,
        groups: BlendGroups,
        expected: Tensor,
        dtype: torch.dtype,
        delta_dtype: DeltaDtype,
    ) -> None:
        """Raises UnsupportedModel unless the mixed batch gives each endpoint's own logits."""
        index, kept = tuple(self._endpoints.tolist()), tuple(self._kept.tolist())
        groups.begin(StepRows((Dial(0.0), Dial(1.0)), index, kept, blended=False))
        logits, of_row = self._logits(blended), self._endpoints[self._kept]
        apart = (expected[0] - expected[1]).abs().amax(1)  # [kept]
        rounding = SELF_CHECK_TOLERANCE[dtype] * expected.abs().max()
        for value, own in enumerate(expected):
            allowed = rounding + value * DELTA_TOLERANCE[delta_dtype] * apart
            error = ((logits - own).abs().amax(1) / allowed)[of_row == value].median()
            if not error <= 1:
                raise UnsupportedModel(
                    f"the self-check failed: blended logits at λ = {value} are off by {error:.2g} "
                    "times what rounding explains"
                )

    def _logits(self, model: PreTrainedModel, device: torch.device | None = None) -> Tensor:
        """Of a model on `device`, where that is not the probe's own."""
        inputs = self._ids, self._positions, self._kept
        ids, positions, kept = (tensor.to(device) for tensor in inputs)
        return forward_logits(model, ids, positions, kept, self.attention).float()

    @contextmanager
    def _recording(self, model: nn.Module) -> Iterator[None]:
        """Records the row axis of every module's first input for as long as it is entered."""
        hooks = [
            module.register_forward_pre_hook(self._recorder(name))
            for name, module in model.named_modules()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _number_of(self, tensor: Tensor) -> int:
        if tensor not in self._read:
            self._read[tensor] = next(self._numbers)
        return int(self._read[tensor])

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                shape = inputs[0].shape
                for kept, count in ((False, self._tokens), (True, self._kept_count)):
                    if list(shape).count(count) == 1:
                        axis = list(shape).index(count)
                        source = self._number_of(inputs[0])
                        self.axes[name] = RowAxis(axis, len(shape), kept, source)

        return record


_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
