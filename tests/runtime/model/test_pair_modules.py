"""The blended forward of every family computes what checkpoints merged offline compute.

The oracle shares no code with the swap: plain `transformers` classes with `eager` attention,
complete sequences without a cache, weights merged in fp32 from both state dicts.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mi_runtime.errors import PairError, UnsupportedModel
from mi_runtime.execution.runner import Runner
from mi_runtime.model import weights as weights_module
from mi_runtime.model.blend_cache import BlendCache
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.load import load_pair
from mi_runtime.model.pair_check import check_pair
from mi_runtime.model.pair_modules import PairEmbedding, PairLinear
from mi_runtime.model.probe import Probe
from mi_runtime.model.row_lambdas import BlendGroups, Rows, StepRows
from mi_runtime.model.swap import ModuleSwap, RowAxis
from mi_runtime.model.weights import PairStorage, VocabularyPair
from mi_runtime.request import Dial, EngineRequest, SamplingParams
from mi_runtime.scheduling.block_pool import BlockPool
from mi_runtime.scheduling.scheduler import Scheduler
from mi_runtime.scheduling.sequence import Sequence
from tests.runtime import oracle
from tests.runtime.families import FAMILIES, VOCABULARY
from tests.runtime.shared_models import as_loaded, shared_model
from tests.runtime.ways import PairPlanner

Directories = tuple[Path, Path]
PairOf = Callable[..., Directories]

LAMBDAS = (0.0, 0.11, 0.5, 0.93, 1.0)
TOLERANCE = 1e-4  # max |Δlogit| in fp32; measured: 3e-5 (gemma3_text), most 1e-5
NEW_TOKENS = 6
BLOCK_SIZE = 4
NUM_BLOCKS = 64

ROPE_OF_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with its rope scaling": ("llama", {"rope_parameters": ROPE_OF_LLAMA_3}),
    "qwen3 with yarn and biases": (
        "qwen3",
        {"rope_parameters": YARN, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "qwen2, tied, windows in some layers": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
}


class RecordingModel:
    """Wraps a BlendedModel, computes the logits of every row, and keeps them for the test."""

    def __init__(self, model: BlendedModel) -> None:
        self._model = model
        self.rows = torch.empty(0)  # [tokens, vocabulary], of the last forward
        self.endpoints: list[int | None] = []  # of every forward
        self.groups = SimpleNamespace(begin=self._begin)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _begin(self, step: StepRows) -> None:
        self._model.groups.begin(replace(step, logits_indices=tuple(range(len(step.index)))))
        self.endpoints.append(self._model.groups.slot("head", logits_only=True).rows.endpoint)

    def logits(self, ids: Tensor, positions: Tensor, kept: Tensor, attention: Any) -> Tensor:
        self.rows = self._model.logits(ids, positions, torch.arange(len(ids)), attention)
        return self.rows[kept]


@dataclass
class Answer:
    """The tokens of one sequence, and the logits of each of its rows."""

    tokens: list[int] = field(default_factory=list)
    pieces: list[Tensor] = field(default_factory=list)

    @property
    def logits(self) -> Tensor:
        return torch.cat(self.pieces).float()


@dataclass
class Run:
    answers: dict[float, Answer]
    endpoints: list[int | None]


def prompts(lambdas: tuple[float, ...]) -> dict[float, list[int]]:
    """Returns prompts of different lengths, longer than the windows of all families."""
    generator = torch.Generator().manual_seed(0)
    return {
        value: torch.randint(3, VOCABULARY, (9 + 5 * index,), generator=generator).tolist()
        for index, value in enumerate(lambdas)
    }


def answer_together(
    model: BlendedModel, requests: dict[float, list[int]], max_batched_tokens: int = 13
) -> Run:
    """Runs requests greedily in one batch, with prefills in small chunks among decodes."""
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, BLOCK_SIZE),
        vocab_size=VOCABULARY,
        max_model_len=64,
        max_num_seqs=16,
        max_batched_tokens=max_batched_tokens,
    )
    recording = RecordingModel(model)
    runner = Runner(recording, PairPlanner(), NUM_BLOCKS, BLOCK_SIZE)  # type: ignore[arg-type]
    answers: dict[float, Answer] = defaultdict(Answer)
    for value, prompt in requests.items():
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
        request = EngineRequest(str(value), tuple(prompt), Dial(value), sampling)
        scheduler.add(Sequence(request))
    while chunks := scheduler.schedule():
        step = runner.launch(chunks)
        runner.sample(step)
        rows = recording.rows.split([chunk.length for chunk in chunks])
        for chunk, piece in zip(chunks, rows, strict=True):
            answers[chunk.sequence.request.dial.reasoning_lambda].pieces.append(piece)
        scheduler.update(chunks, step.results().sampled)
        for chunk in chunks:
            value = chunk.sequence.request.dial.reasoning_lambda
            answers[value].tokens = list(chunk.sequence.tokens)
    return Run(dict(answers), recording.endpoints)


def load(directories: Directories, dtype: Any = "float32") -> BlendedModel:
    return load_pair(check_pair(*directories), "cpu", dtype)


def oracle_model(directories: Directories, value: float) -> Any:
    """Returns the oracle at λ, which is the endpoint itself at 0 and 1."""
    if value in (0.0, 1.0):
        return oracle.endpoint(directories[int(value)])
    return oracle.merged(*directories, value)


# --- Against the oracle, in fp32 ----------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A family's loaded pair, and the run of one mixed batch."""

    directories: Directories
    model: BlendedModel
    run: Run

    def logits_of(self, value: float, oracle_value: float) -> Tensor:
        """Returns the oracle's logits for all tokens but the last of the answer at λ."""
        model = oracle_model(self.directories, oracle_value)
        return oracle.logits(model, self.run.answers[value].tokens[:-1])


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest, pair_of: PairOf) -> Subject:
    family, changes = SUBJECTS[request.param]
    directories = pair_of(family, **changes)
    model = shared_model(directories)
    return Subject(directories, model, answer_together(model, prompts(LAMBDAS)))


def test_a_mixed_batch_gives_each_row_the_logits_of_its_merged_checkpoint(subject: Subject) -> None:
    """The greedy tokens are then the best ones of the oracle's logits."""
    assert subject.run.answers.keys() == set(LAMBDAS)
    for value, prompt in prompts(LAMBDAS).items():
        answer, wanted = subject.run.answers[value], subject.logits_of(value, value)
        assert (answer.logits - wanted).abs().max() < TOLERANCE, value
        assert answer.tokens == prompt + wanted[len(prompt) - 1 :].argmax(1).tolist()
        assert len(answer.tokens) == len(prompt) + NEW_TOKENS


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_batch_at_an_endpoint_agrees_with_the_mixed_batch(subject: Subject, value: float) -> None:
    alone = answer_together(as_loaded(subject.model), {value: prompts(LAMBDAS)[value]})
    mixed = subject.run.answers[value]
    assert set(alone.endpoints) == {int(value)}
    assert alone.answers[value].tokens == mixed.tokens
    assert (alone.answers[value].logits - mixed.logits).abs().max() < TOLERANCE


def test_one_step_of_the_grid_changes_the_logits_by_more_than_the_tolerance(
    subject: Subject,
) -> None:
    """Otherwise the tests above would pass with a wrong λ."""
    other = subject.logits_of(0.5, oracle_value=0.51)
    assert (subject.run.answers[0.5].logits - other).abs().max() > 20 * TOLERANCE


# --- In bf16 ------------------------------------------------------------------------------------


def test_a_mixed_bf16_batch_is_as_near_to_fp32_as_merged_bf16_checkpoints(
    pair_of: PairOf,
) -> None:
    directories = pair_of("qwen3", dtype=torch.bfloat16, num_hidden_layers=8, hidden_size=96)
    run = answer_together(load(directories, "bfloat16"), prompts(LAMBDAS))
    served, static = [], []
    for value, answer in run.answers.items():
        truth = oracle.logits(oracle.merged(*directories, value), answer.tokens[:-1])
        rounded = oracle.merged(*directories, value, torch.bfloat16)
        served.append((answer.logits - truth).abs().mean())
        static.append((oracle.logits(rounded, answer.tokens[:-1]) - truth).abs().mean())
    assert sum(served) < 1.05 * sum(static)  # the margin; measured: 0.92


# --- Modules ------------------------------------------------------------------------------------


def plant_infinities(model: BlendedModel) -> None:
    """Fills the Thinking endpoint of every matrix with infinity."""
    for module in model.model.modules():
        if isinstance(module, PairLinear | PairEmbedding):
            module.pair.endpoints[1].fill_(torch.inf)


def test_an_infinity_in_thinking_never_reaches_a_batch_at_instruct(pair_of: PairOf) -> None:
    model, prompt = load(pair_of("qwen3")), prompts(LAMBDAS)[0.0]
    before = answer_together(model, {0.0: prompt}).answers[0.0].logits
    plant_infinities(model)
    after = answer_together(model, {0.0: prompt}).answers[0.0].logits
    assert torch.equal(before, after)


def test_tied_embeddings_stay_one_tensor(pair_of: PairOf) -> None:
    model = shared_model(pair_of("qwen3")).model
    assert model.get_input_embeddings().pair is model.get_output_embeddings().pair


def test_untied_embeddings_stay_two_tensors(pair_of: PairOf) -> None:
    model = shared_model(pair_of("qwen2")).model
    assert model.get_input_embeddings().pair is not model.get_output_embeddings().pair


@pytest.mark.parametrize(
    ("family", "alone"),
    [
        ("qwen2", ["down_proj", "o_proj"]),
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
        ("starcoder2", ["c_fc", "c_proj", "o_proj"]),
        ("qwen2_moe", ["down_proj", "o_proj", "shared_expert_gate"]),
    ],
)
def test_linear_modules_that_read_one_input_share_a_matrix(
    family: str, alone: list[str], pair_of: PairOf
) -> None:
    names: dict[object, list[str]] = defaultdict(list)
    for name, module in shared_model(pair_of(family)).model.named_modules():
        if isinstance(module, PairLinear) and "layers.1." in name:
            names[module.pair].append(name.rpartition(".")[2])
    together = [those for those in names.values() if len(those) > 1]
    assert sorted(those[0] for those in names.values() if len(those) == 1) == alone
    expected = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    assert all(those in expected for those in together)
    assert (expected[0] in together) == ("qkv_proj" not in alone)


class LargestFloat(TorchDispatchMode):
    """Records the size of the largest fp32 tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        if isinstance(made, Tensor) and made.dtype is torch.float32:
            self.numbers = max(self.numbers, made.numel())
        return made


def test_logits_of_many_rows_are_computed_in_pieces() -> None:
    """512 scored positions of a vocabulary of 150,000 once took over a GB of the KV cache."""
    matrix = torch.empty(150_000, 64, dtype=torch.bfloat16, device="meta")
    pair, rows = VocabularyPair(matrix, matrix), Rows(torch.empty(512, device="meta"), None)
    with LargestFloat() as largest:
        logits = pair.product(matrix[:512], rows)
    assert logits.shape == (512, 150_000)
    assert largest.numbers == 512 * weights_module.VOCABULARY_PIECE


@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8)])
def test_logits_computed_in_pieces_are_the_same(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(2, 23, 8, generator=generator)
    x, weights = torch.randn(shape, generator=generator), torch.linspace(0, 1, 5)
    monkeypatch.setattr(weights_module, "VOCABULARY_PIECE", 7)
    found = VocabularyPair(low, high).product(x, Rows(weights, None))
    torch.testing.assert_close(found, torch.lerp(x @ low.T, x @ high.T, weights.unsqueeze(1)))


def test_modules_that_share_a_matrix_blend_it_once(pair_of: PairOf) -> None:
    model = shared_model(pair_of("llama"))
    layer = model.model.model.layers[0].self_attn
    model.groups.begin(StepRows((Dial(0.3),), (0, 0), (0, 1), blended=True))
    x = torch.randn(1, 2, 48)
    query, key, value = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    assert (query.shape[-1], key.shape[-1], value.shape[-1]) == (48, 24, 24)
    assert model.groups.cache.nbytes == (48 + 24 + 24) * 48 * 4
    model.groups.end()


def test_each_parameter_is_counted_once(pair_of: PairOf) -> None:
    directories = pair_of("qwen3")
    endpoints = [oracle.endpoint(directory) for directory in directories]
    tensors = [t for one in endpoints for t in (*one.parameters(), *one.buffers())]
    assert shared_model(directories).weight_bytes == sum(tensor.nbytes for tensor in tensors)


def swapped(instruct: nn.Module, thinking: nn.Module, axes: dict[str, RowAxis]) -> nn.Module:
    """Returns the Instruct module with its parts replaced by pair modules."""
    groups = BlendGroups(1, torch.device("cpu"), BlendCache())
    for _ in ModuleSwap(groups, axes, PairStorage()).swap(instruct, thinking):
        pass
    return instruct


ROWS_FIRST = RowAxis(axis=0, dims=2, logits_only=False)


class UnknownModule(nn.Module):
    """Has a parameter that no swap covers."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(3))


def test_a_parameter_that_no_swap_covers_is_refused_by_name() -> None:
    models = [nn.ModuleDict({"odd": UnknownModule()}) for _ in range(2)]
    with pytest.raises(
        UnsupportedModel, match=r"odd\.gamma: parameters of UnknownModule are not supported"
    ):
        swapped(*models, {"odd": ROWS_FIRST})


def test_a_module_whose_rows_the_probe_cannot_find_is_refused_by_name() -> None:
    models = [nn.ModuleDict({"layer": nn.Linear(3, 4)}) for _ in range(2)]
    with pytest.raises(UnsupportedModel, match=r"layer: the probe could not determine its rows"):
        swapped(*models, {})


def test_a_constant_buffer_that_differs_is_refused_by_name() -> None:
    models = [nn.Module(), nn.Module()]
    for value, model in enumerate(models):
        model.register_buffer("inv_freq", torch.tensor([float(value)]), persistent=False)
    with pytest.raises(UnsupportedModel, match="inv_freq differs between the endpoints"):
        swapped(*models, {})


def test_a_model_that_blends_wrongly_fails_the_self_check(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Probe.expected_logits
    monkeypatch.setattr(Probe, "expected_logits", lambda *models: right(*models).roll(1, dims=0))
    with pytest.raises(PairError, match="self-check failed"):
        load(pair_of("qwen3"))
