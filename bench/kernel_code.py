"""Compiles the kernels for a GPU that need not be there, and prints what they use of it.

    python -m bench.kernel_code                       a table, for compute capability 9.0
    python -m bench.kernel_code --model 4b --json     one JSON line for each compiled kernel
    python -m bench.kernel_code --pack FILE           for another machine with the same Triton
    python -m bench.kernel_code --unpack FILE --into DIR

The host code of `mi_runtime.kernels` runs at the shapes of real models, on tensors whose memory is
never touched. Its launches go all the way through Triton, with a driver that loads and runs no
binary. So exactly the kernels that serving launches are compiled.

If TRITON_CACHE_DIR names an unpacked cache, the command reports how many kernels it did not find
there. `bench/carried/kernel_cache.py` describes what a cache contains and where it is valid.

It measures no speed. It needs Triton, and cannot run with TRITON_INTERPRET set.
"""

import argparse
import json
import lzma
import math
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from bench.carried.kernel_cache import pack, unpack
from bench.models.shapes import SHAPES, Shape
from mi_runtime.kernels.triton_support import triton_installed, triton_interpreted

PROCESSORS: Final = 132
SHARED: Final = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""KiB of shared memory that a program may have, by 10 times the compute capability."""
GROUP: Final = 64  # inputs that share a scale of int4
BLOCK_SIZE: Final = 16  # tokens of a KV block
CONTEXTS: Final = (1024, 8192, 262_144)  # bounds of the lengths; the last is the longest context
PREFILLS: Final = tuple(2**power for power in range(1, 12))  # tokens of a chunk
EMBEDDED: Final = Shape(6, 128, 384, 4, 2, 32, 320, tied=True)
LARGE_HEADS: Final = Shape(1, 4096, 4096, 16, 4, 256, 32_000, tied=True)
MANY_HEADS: Final = Shape(1, 4096, 4096, 64, 8, 64, 32_000, tied=True)


@dataclass(frozen=True, slots=True)
class Case:
    """A call of the kernels' host code, as serving makes it."""

    model: str
    what: str
    rows: int
    call: Callable[[], object]

    def __str__(self) -> str:
        return f"{self.model}: {self.what} of {self.rows}"


@dataclass(slots=True)
class Variant:
    """A compiled kernel, and the cases that launch it."""

    kernel: str
    shared: int  # bytes
    registers: int  # of a thread
    spilled: int  # bytes of a thread
    in_flight: int | None  # groups of loads that are in progress; None: unknown
    tensor_cores: str | None  # the instruction that multiplies, if any
    seconds: float  # seconds of compilation; 0 if it was found
    found: bool  # in the cache
    cases: list[str] = field(default_factory=list)


# --- A driver without a device -------------------------------------------------------------------


class Driver:
    """Replaces Triton's driver: records every launch, and runs none."""

    def __init__(self, capability: int, launcher: Callable[..., object] | None = None) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self._launcher = launcher
        self.utils = self
        self.launched: list[str] = []  # kernels, by hash

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1024 * SHARED[self._target.arch]}

    def unload_module(self, module: str) -> None: ...

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Returns module, function, registers, spills, and the most threads of a program."""
        return "module", "function", 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        if self._launcher is not None:
            self._launcher(source, metadata)
        return partial(self._launch, metadata.hash)

    def _launch(self, kernel: str, x: int, y: int, z: int, *_: object) -> None:
        assert max(y, z) <= 65_535, (x, y, z)  # of a grid in CUDA
        assert x * y * z < 2**31, (x, y, z)  # Triton launches nothing where this is not positive
        self.launched.append(kernel)


def compiled(
    cases: Iterable[Case], capability: int = 90, launcher: Callable[..., object] | None = None
) -> list[Variant]:
    """Compiles all kernels that the cases launch, or finds them in the cache; returns each once."""
    from triton import knobs

    variants: dict[str, Variant] = {}

    def listen(*, metadata: dict[str, Any], metadata_group: Any, times: Any, **others: Any) -> None:
        variants[metadata["hash"]] = _variant(metadata, metadata_group, times, others["cache_hit"])

    with _on(Driver(capability, launcher)) as driver, knobs.compilation.scope():
        knobs.compilation.listener = listen
        for case in cases:
            case.call()
            for kernel in dict.fromkeys(driver.launched):
                variants[kernel].cases.append(str(case))
            driver.launched.clear()
    return list(variants.values())


def distinct(cases: Iterable[Case], capability: int = 90) -> dict[tuple[str, str], list[str]]:
    """Returns the kernels that the cases launch, each with its cases. Compiles nothing.

    Kernels are distinguished as Triton does, by name and key.
    """
    from triton import knobs

    found: dict[tuple[str, str], list[str]] = {}
    with _on(Driver(capability)), knobs.runtime.scope():
        for case in cases:

            def skip(*, key: str, fn: Any, case: Case = case, **_: object) -> bool:
                found.setdefault((fn.name, key), []).append(str(case))
                return True

            knobs.runtime.jit_cache_hook = skip
            case.call()
    return found


@contextmanager
def _on(driver: Driver) -> Iterator[Driver]:
    from triton.runtime.driver import driver as active
    from triton.runtime.jit import JITFunction

    from mi_runtime.kernels import paged_attention, pair_linear

    assert not triton_interpreted()
    capability = driver.get_current_target().arch
    active.set_active(driver)
    for kernel in (*vars(paged_attention).values(), *vars(pair_linear).values()):
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()  # of this process, and another driver
    with (
        patch.object(paged_attention, "architecture", lambda _: capability),
        patch.object(paged_attention, "processors", lambda _: PROCESSORS),
    ):
        yield driver


def _variant(metadata: dict[str, Any], files: dict[str, str], times: Any, found: bool) -> Variant:
    paths = {Path(file).suffix: Path(file) for file in files.values()}
    usage = _resource_usage(paths[".cubin"])
    ptx = paths[".ptx"].read_text() if ".ptx" in paths else None
    return Variant(
        kernel=metadata["name"],
        shared=metadata["shared"],
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spilled=int(re.findall(r"STACK:(\d+)", usage)[0]),
        in_flight=None if ptx is None else _in_flight(ptx),
        tensor_cores=None if ptx is None else _tensor_cores(ptx),
        seconds=0.0 if found else times.total / 1e6,
        found=found,
    )


def _in_flight(ptx: str) -> int:
    """Counts the loads of next tiles that are still in progress while a tile is computed."""
    waits = re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)
    return max(map(int, waits), default=0)


def _tensor_cores(ptx: str) -> str:
    return next((name for name in ("wgmma", "tcgen05", "mma.sync") if f"{name}." in ptx), "")


def _resource_usage(binary: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- What serving launches -----------------------------------------------------------------------


def serving(model: str, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    """Yields a case for every number of rows that is captured or measured, and prefill chunks."""
    from mi_runtime.execution.cost_measurement import KERNEL_ROWS
    from mi_runtime.execution.decode_graphs import SIZES

    decodes = sorted({1, *SIZES})
    for rows in sorted({*SIZES, *KERNEL_ROWS}):
        if rows <= max(KERNEL_ROWS):
            yield from products(model, shape, rows, dtype)
    for rows in sorted({*decodes, *PREFILLS}):
        yield from experts(model, shape, rows, dtype)
        yield Case(model, "writing KV", rows, partial(write, shape, rows, dtype))
    for rows in decodes:
        for context in CONTEXTS:
            call = partial(attend, shape, rows, rows, context, dtype)
            yield Case(model, f"decode over {context}", rows, call)
    for rows in PREFILLS:
        for before in (0, *CONTEXTS[:2]):
            call = partial(attend, shape, rows, 0, before + rows, dtype)
            yield Case(model, f"prefill after {before}", rows, call)


def tested() -> Iterator[Case]:
    """Yields cases that only `tests/gpu` launches.

    They are those of the embedded pair, and products and attention of all kinds.
    """
    for dtype in (torch.float32, torch.bfloat16):
        yield from serving("embedded", EMBEDDED, dtype)
    down = matrices(SHAPES["4b"])["down"]
    for rows, dtype in product((1, 32), (torch.float32, torch.float16)):
        yield Case("4b", f"{dtype} down pair", rows, partial(_pair, rows, *down, dtype))
    kinds = (
        ("4b", partial(attend, SHAPES["4b"]), SHAPES["4b"]),
        ("30b-a3b", partial(attend, SHAPES["30b-a3b"]), SHAPES["30b-a3b"]),
        ("large heads", partial(attend, LARGE_HEADS, window=1024), LARGE_HEADS),
        ("sinks", partial(attend, MANY_HEADS, window=128, sinks=True), MANY_HEADS),
    )
    halves = product(kinds, (torch.bfloat16, torch.float16))
    for (model, call, shape), dtype in (*halves, (kinds[0], torch.float32)):
        yield Case(model, "writing KV", 32, partial(write, shape, 32, dtype))
        for rows, longest in ((32, 1024), (8, 1024), (2, 16_384)):
            decode = partial(call, rows, rows, longest, dtype)
            yield Case(model, f"{dtype} decode over {longest}", rows, decode)
        yield Case(model, f"{dtype} prefill", 1024, partial(call, 1024, 0, 2048, dtype))


LAUNCHED: Final[dict[str, Callable[[], Iterator[Case]]]] = {
    **{name: partial(serving, name, shape) for name, shape in SHAPES.items()},
    "tests": tested,
}


def products(model: str, shape: Shape, rows: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yields cases of the dense matrices, for each form in which Thinking is stored."""
    for what, (columns, depth) in matrices(shape).items():
        for kind, call in (("pair", _pair), ("int8", _int8), ("int4", _int4)):
            yield Case(model, f"{what} {kind}", rows, partial(call, rows, columns, depth, dtype))


def matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Returns the shapes `[out, in]` of the matrices that modules share, and of the head."""
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found = {
        "q, k and v": (query + 2 * kv, shape.hidden),
        "output of attention": (shape.hidden, query),
        "head": (shape.vocabulary, shape.hidden),
    }
    if shape.experts:
        return found
    mlp = {"gate and up": (2 * shape.inner, shape.hidden), "down": (shape.hidden, shape.inner)}
    return found | mlp


def experts(model: str, shape: Shape, rows: int, dtype: torch.dtype) -> Iterator[Case]:
    if not shape.experts:
        return
    for kind in ("single", "pair", "int8", "int4"):
        call = partial(_experts, shape, rows, kind, dtype)
        yield Case(model, f"experts {kind}", rows, call)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor whose memory is reserved and never touched."""
    return torch.empty(shape, dtype=dtype)


def _pair(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    from mi_runtime.kernels.pair_linear import pair_linear

    both = empty(columns, 2, depth, dtype=dtype)
    pair_linear(empty(rows, depth, dtype=dtype), both[:, 0], both[:, 1], torch.zeros(rows))


def _int8(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    _delta(rows, empty(columns, depth, dtype=dtype), *_rounded("int8", columns, depth))


def _int4(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    _delta(rows, empty(columns, depth, dtype=dtype), *_rounded("int4", columns, depth))


def _delta(rows: int, base: Tensor, delta: Tensor, scales: Tensor) -> None:
    from mi_runtime.kernels.pair_linear import delta_linear

    x = empty(rows, base.shape[1], dtype=base.dtype)
    delta_linear(x, base, delta, scales, torch.zeros(rows))


def _rounded(kind: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Returns a delta and its scales, in the layout of `mi_runtime/model/delta.py`."""
    *outer, inputs = shape
    if kind == "int8":
        return empty(*shape, dtype=torch.int8), empty(*outer, 1, dtype=torch.float32)
    groups = math.ceil(inputs / GROUP)
    values = empty(*outer, groups * GROUP // 2, dtype=torch.uint8)
    return values, empty(*outer, groups, dtype=torch.bfloat16)


def _experts(shape: Shape, rows: int, kind: str, dtype: torch.dtype) -> None:
    """Computes both projections: the first of the tokens, the second of the first one's results."""
    from mi_runtime.kernels.pair_linear import align, grouped_linear

    alignment = align(torch.zeros(rows, shape.chosen, dtype=torch.int64), shape.experts)
    weights, assignments = torch.zeros(rows), rows * shape.chosen
    for columns, depth, gather in (
        (2 * shape.inner, shape.hidden, True),
        (shape.hidden, shape.inner, False),
    ):
        x = empty(rows if gather else assignments, depth, dtype=dtype)
        first, second, scales = _expert_matrices(kind, (shape.experts, columns, depth), dtype)
        grouped_linear(x, first, second, scales, None, weights, alignment, gather=gather)


def _expert_matrices(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    experts, columns, depth = shape
    if kind == "pair":
        both = empty(experts, columns, 2, depth, dtype=dtype)
        return both[:, :, 0], both[:, :, 1], None
    first = empty(*shape, dtype=dtype)
    return (first, None, None) if kind == "single" else (first, *_rounded(kind, *shape))


def write(shape: Shape, rows: int, dtype: torch.dtype) -> None:
    """Writes KV.

    Keys have a tensor of their own, after norm and rotation. Values are a view of the product that
    they share with queries and keys.
    """
    from mi_runtime.kernels.paged_attention import write_kv

    kv_heads, dim = shape.kv_heads, shape.head_dim
    keys, values = (empty(64, BLOCK_SIZE, kv_heads, dim, dtype=dtype) for _ in range(2))
    shared = empty(rows, shape.heads + 2 * kv_heads, dim, dtype=dtype)
    slots = empty(rows, dtype=torch.int64)
    write_kv(keys, values, empty(rows, kv_heads, dim, dtype=dtype), shared[:, -kv_heads:], slots)


def attend(
    shape: Shape,
    rows: int,
    decodes: int,
    longest: int,
    dtype: torch.dtype,
    window: int | None = None,
    sinks: bool = False,
) -> None:
    """Attends with `decodes` rows, each of a sequence of up to `longest` tokens.

    If `decodes` is 0, attends with a chunk of `rows` tokens of one sequence.
    """
    from mi_runtime.kernels.paged_attention import paged_attention

    dim, chunks = shape.head_dim, decodes or 1
    cache = empty(64, BLOCK_SIZE, shape.kv_heads, dim, dtype=dtype)
    tables = empty(chunks, math.ceil(longest / BLOCK_SIZE), dtype=torch.int32)
    numbers = empty(chunks + 1, dtype=torch.int32)
    own = empty(shape.heads, dtype=dtype) if sinks else None
    paged_attention(
        query=empty(rows, shape.heads, dim, dtype=dtype),
        keys=cache,
        values=cache,
        block_tables=tables,
        lengths=numbers[:-1],
        query_starts=numbers,
        sinks=own,
        scale=dim**-0.5,
        window=window,
        decodes=decodes,
        longest_decode=longest if decodes else 0,
        longest=longest,
    )


# --- Output -----------------------------------------------------------------------------


def table(variants: Iterable[Variant]) -> Iterator[str]:
    yield "kernel            regs  spill   shared loads  by           s  launched"
    for one in sorted(variants, key=lambda one: (one.kernel, -one.registers)):
        loads = "" if one.in_flight is None else one.in_flight
        more = f" and {len(one.cases) - 1} more" if len(one.cases) > 1 else ""
        yield (
            f"{one.kernel:<17}{one.registers:>5}{one.spilled:>7}{one.shared:>9,}{loads:>6}  "
            f"{one.tensor_cores or '':<9}{one.seconds:>5.1f}  {one.cases[0]}{more}"
        )


def summary(variants: Iterable[Variant]) -> str:
    variants = list(variants)
    counts = Counter(one.kernel for one in variants)
    found, seconds = sum(one.found for one in variants), sum(one.seconds for one in variants)
    return (
        f"{len(variants)} kernels ({', '.join(f'{n} {name}' for name, n in counts.items())}): "
        f"{found} found, {len(variants) - found} compiled in {seconds:.0f} s; "
        f"{sum(one.spilled > 0 for one in variants)} spill, "
        f"at most {max(one.shared for one in variants) / 1024:.0f} KiB of shared memory"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if (chosen.unpack is None) != (chosen.into is None):
        parser.error("--unpack and --into need each other")
    if not chosen.unpack and (not triton_installed() or triton_interpreted()):
        parser.error("compiling needs Triton, and TRITON_INTERPRET must not be set")
    try:
        if chosen.unpack:
            print(f"{unpack(chosen.unpack, chosen.into)} kernels in {chosen.into}")
        else:
            report(compiled_for(chosen), chosen.json)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        parser.error(f"{type(error).__name__}: {error}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=LAUNCHED, action="append", help="default: all")
    parser.add_argument(
        "--capability", type=int, choices=sorted(SHARED), default=90, help="10 times the GPU's (90)"
    )
    parser.add_argument("--json", action="store_true", help="print one line for each kernel")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="write the compiled kernels to this .tar.xz"
    )
    parser.add_argument(
        "--unpack", type=Path, metavar="FILE", help="unpack this .tar.xz, and compile nothing"
    )
    parser.add_argument(
        "--into", type=Path, metavar="DIR", help="folder to unpack to, for TRITON_CACHE_DIR"
    )
    return parser


def compiled_for(chosen: argparse.Namespace) -> list[Variant]:
    cases = (case for name in chosen.model or LAUNCHED for case in LAUNCHED[name]())
    compile_all = partial(compiled, cases, chosen.capability)
    return pack(chosen.pack, compile_all) if chosen.pack else compile_all()


def report(variants: Iterable[Variant], as_json: bool) -> None:
    variants = list(variants)
    lines = (json.dumps(asdict(one)) for one in variants) if as_json else table(variants)
    for line in lines:
        print(line, flush=True)
    print(summary(variants), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
