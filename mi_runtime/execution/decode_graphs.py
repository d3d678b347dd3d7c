"""Captures decode steps as CUDA graphs at start, and replays each as one launch.

A forward pass of decodes can be replayed if all blend groups are computed in one way: by the pair
product, from one endpoint, or from one place of the blend cache. Each way is captured for several
numbers of rows. A batch uses the next larger number, and the remaining rows are padding: a token of
no sequence, whose KV is written to the null block. All values that change between steps are in
buffers that are written before a replay: token ids, positions, block tables, and the λ of every row
in every group, so that no mix of dials needs a graph of its own. Any other batch runs eagerly,
launch by launch.

The caller decides how to capture: with `CudaGraphs` on CUDA; tests replay by computing again.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mi_runtime.attention.paged import PagedAttention
from mi_runtime.attention.plan import AttentionPlan
from mi_runtime.device.transfer import ALIGNED, on_device
from mi_runtime.execution.batch import Batch
from mi_runtime.model.blended_model import BlendedModel
from mi_runtime.model.row_lambdas import Rows, StepRows, Way
from mi_runtime.request import Dial
from mi_runtime.scheduling.chunk import Chunk
from mi_runtime.scheduling.planner import SubBatch

SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Row counts to capture. One row runs as two, as a layer would be compiled again for one row."""

Forward = Callable[[Tensor, Tensor, Tensor, PagedAttention], Tensor]
"""Takes ids, positions, logits indices and attention; returns logits."""
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes the function to capture; returns one that replays it and returns the rewritten tensor."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    """Identifies one graph by what it computes."""

    rows: int
    way: Way
    index: int = 0  # the endpoint, or the place in the blend cache


class CudaGraphs:
    """Captures CUDA graphs, which share one memory pool because they run one at a time.

    A stream keeps cuBLAS workspaces forever once it has captured a graph, so one stream should
    capture all graphs.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = stream

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        # A capture that fails may leave its stream current; this context restores the other.
        with torch.cuda.stream(self._stream):
            run()  # compiles and loads kernels and allocates workspaces, forbidden in a capture
            # Other threads of the process may use the device meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class DecodeGraphs:
    """The graphs of one model over one KV cache, and the buffers that they read.

    `sizes` are numbers of rows, ascending, at least 2. `max_blocks` is the most blocks of one
    sequence. `capture` takes what `forward` computes; its default is `model.logits`.
    """

    def __init__(
        self,
        model: BlendedModel,
        attention: PagedAttention,
        capture: Capture,
        *,
        sizes: tuple[int, ...],
        max_blocks: int,
        forward: Forward | None = None,
    ) -> None:
        self._model = model
        self._groups = model.groups
        self._attention = attention
        self._capture = capture
        self._forward = forward or model.logits
        self._sizes = sizes
        self._replays: dict[GraphKey, Callable[[], Tensor]] = {}
        self._buffered: StepRows | None = None  # the rows whose λ are in the buffer
        self.device = model.device
        most, device, null_block = self._sizes[-1], model.device, attention.null_block

        def numbers(*shape: int, value: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self._ids = numbers(most, value=0, dtype=torch.int64)
        self._positions = numbers(most, value=0, dtype=torch.int64)
        self._slot_mapping = numbers(
            most, value=null_block * attention.block_size, dtype=torch.int64
        )
        self._lengths = numbers(most, value=1, dtype=torch.int32)
        self._block_tables = numbers(most, max_blocks, value=null_block, dtype=torch.int32)
        self._logits_indices = torch.arange(most, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._partial_blocks = self._logits_indices[:0]
        self._logits = torch.zeros(most, model.vocab_size, dtype=model.dtype, device=device)
        self._lambdas = _aligned_zeros(len(self._groups.names), most, device=device)
        self._buffered_dials: dict[int, Dial] = {}  # the dial whose λ are in the buffer, by place
        self._place_lambdas = _aligned_zeros(
            self._groups.cache.places, len(self._groups.names), 1, device=device
        )
        self._shared = torch.arange(2.0, device=device)  # λ of the endpoints
        self._rows = {key: self._rows_of(key) for key in self._keys()}

    # --- Capturing -------------------------------------------------------------------------------

    @property
    def keys(self) -> tuple[GraphKey, ...]:
        """All graphs to capture, the largest first, so that the others reuse its memory."""
        return tuple(self._rows)

    @property
    def smallest(self) -> tuple[GraphKey, Callable[[], Tensor]]:
        """The graph of the fewest rows, and the function that replays it on the buffers."""
        key = min(self._replays, key=lambda key: (key.rows, key.way is not Way.ENDPOINT))
        return key, self._replays[key]

    @torch.inference_mode()
    def capture(self, keys: Sequence[GraphKey] | None = None) -> None:
        """Captures these keys, or all. Afterwards the blend cache is empty, but allocated."""
        keys = keys or self.keys
        self._build_places()
        for key in tqdm(keys, "Capturing CUDA graphs", disable=None):
            self._replays[key] = self._capture(lambda key=key: self._run(key))  # type: ignore[misc]
        self._groups.cache.forget()

    def _build_places(self) -> None:
        """Allocates the tensors of every blend cache place, which a capture must not do."""
        for place in range(self._groups.cache.places):
            key = GraphKey(self._sizes[-1], Way.BLENDED, place)
            self._groups.set_rows(self._rows[key])
            self._attention.begin(self._plan(key.rows))
            self._model.logits(self._ids, self._positions, self._logits_indices, self._attention)

    def _keys(self) -> Iterator[GraphKey]:
        for rows in reversed(self._sizes):
            yield GraphKey(rows, Way.PAIR)
            for endpoint in self._groups.endpoints.values():
                yield GraphKey(rows, Way.ENDPOINT, endpoint)
            for place in range(self._groups.cache.places):
                yield GraphKey(rows, Way.BLENDED, place)

    def _rows_of(self, key: GraphKey) -> dict[str, Rows]:
        """Returns the rows of every blend group in one graph: views of the buffers."""
        names, cache = self._groups.names, self._groups.cache
        if key.way is Way.PAIR:
            table = self._lambdas[:, : key.rows]
            return {
                name: Rows(mine, None, live=True) for name, mine in zip(names, table, strict=True)
            }
        if key.way is Way.ENDPOINT:
            lambdas = self._shared[key.index : key.index + 1]
            return dict.fromkeys(names, Rows(lambdas, key.index))
        stand_in = (key.index + 0.5) / cache.places  # a λ that no other place has
        return {
            name: Rows(mine, None, cache.use((name, stand_in)), live=True)
            for name, mine in zip(names, self._place_lambdas[key.index], strict=True)
        }

    def _run(self, key: GraphKey) -> Tensor:
        """Computes the forward pass to capture, from the buffers into the logits buffer."""
        rows = key.rows
        self._groups.set_rows(self._rows[key])
        self._attention.begin(self._plan(rows))
        logits = self._forward(
            self._ids[:rows], self._positions[:rows], self._logits_indices[:rows], self._attention
        )
        return self._logits[:rows].copy_(logits)

    def _plan(self, rows: int) -> AttentionPlan:
        longest = self._block_tables.shape[1] * self._attention.block_size
        return AttentionPlan(
            slot_mapping=self._slot_mapping[:rows],
            query_starts=self._starts[: rows + 1],
            lengths=self._lengths[:rows],
            block_tables=self._block_tables[:rows],
            longest_decode=longest,
            longest_query=1,
            longest=longest,
            prefills=(),
            partial_blocks=self._partial_blocks,
        )

    # --- Replaying -------------------------------------------------------------------------------

    def key_for(self, sub_batch: SubBatch) -> GraphKey | None:
        """Returns the key of the graph that computes this sub-batch, or None."""
        chunks = sub_batch.chunks
        if len(chunks) > self._sizes[-1] or not all(map(_is_decode, chunks)):
            return None
        rows = self._sizes[bisect_left(self._sizes, len(chunks))]
        dials = {chunk.dial for chunk in chunks}
        first = chunks[0].dial
        key: GraphKey | None = GraphKey(rows, Way.PAIR)
        if len(dials) == 1 and first is not None:
            key = self._key_of_one_dial(rows, first, sub_batch.blended)
        return key if key in self._replays else None

    def _key_of_one_dial(self, rows: int, dial: Dial, blended: bool) -> GraphKey | None:
        keys = [(name, dial.value_of(name)) for name in self._groups.names]
        values = {value for _, value in keys}
        endpoints = self._groups.endpoints
        if len(values) == 1 and values <= endpoints.keys():
            return GraphKey(rows, Way.ENDPOINT, endpoints[values.pop()])
        if not blended:
            return GraphKey(rows, Way.PAIR)
        place = self._groups.cache.common_place(keys)
        return None if place is None else GraphKey(rows, Way.BLENDED, place)

    def replay(self, key: GraphKey, batch: Batch) -> Tensor:
        """Returns the logits `[rows, vocabulary]`, which the next replay overwrites."""
        count = len(batch.ids)
        self._write(batch, count, key.rows)
        self._write_lambdas(key, batch.rows)
        logits = self._replays[key]()
        self._groups.count(key.way)
        return logits[:count]

    def _write(self, batch: Batch, count: int, rows: int) -> None:
        plan = batch.attention
        self._ids[:count].copy_(batch.ids)
        self._positions[:count].copy_(batch.positions)
        self._slot_mapping[:count].copy_(plan.slot_mapping)
        self._lengths[:count].copy_(plan.lengths)
        self._block_tables[:count, : plan.block_tables.shape[1]].copy_(plan.block_tables)
        if count < rows:  # values of an earlier step must not overwrite KV
            self._slot_mapping[count:rows].fill_(
                self._attention.null_block * self._attention.block_size
            )
            self._lengths[count:rows].fill_(1)

    def _write_lambdas(self, key: GraphKey, step: StepRows) -> None:
        if key.way is Way.BLENDED:
            (dial,) = step.dials
            for name in self._groups.names:
                self._groups.cache.use((name, dial.value_of(name)))
            if self._buffered_dials.get(key.index) != dial:
                self._place_lambdas[key.index] = self._values(step).T  # [groups, 1]
                self._buffered_dials[key.index] = dial
        elif key.way is Way.PAIR and step != self._buffered:
            index = on_device(step.index, torch.int64, self._lambdas.device)
            self._lambdas[:, : len(index)] = self._values(step).T[:, index]
            self._buffered = step

    def _values(self, step: StepRows) -> Tensor:
        """Returns the λ of every dial in every group, `[dials, groups]` fp32."""
        flat = [dial.value_of(name) for dial in step.dials for name in self._groups.names]
        return on_device(flat, torch.float32, self._lambdas.device).view(len(step.dials), -1)


def sizes_for(max_rows: int, wanted: Sequence[int] = SIZES) -> tuple[int, ...]:
    """Returns the wanted row counts, ascending, each limited to `max_rows` and at least 2."""
    return tuple(sorted({max(2, min(size, max_rows)) for size in wanted}))


def _aligned_zeros(*shape: int, device: torch.device) -> Tensor:
    """Returns zeros whose rows start at multiples of 16 bytes, which compiled kernels assume."""
    *outer, last = shape
    step = ALIGNED // torch.float32.itemsize
    return torch.zeros(*outer, -(-last // step) * step, device=device)[..., :last]


def _is_decode(chunk: Chunk) -> bool:
    return chunk.length == 1 and chunk.samples and not chunk.scored
