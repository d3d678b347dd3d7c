"""Which way imports point: `server` to `mi_runtime` and never back, and policy without tensors.

Read from the files, and tried: what the policy modules bring in is asked of a fresh interpreter.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POLICY = (
    *("config", "request", "blocks", "sequence", "scheduler", "thinking", "grammar", "planner"),
)
SERVER_POLICY = ("router", "elastic", "observed", "profiles", "inputs", "routing")
TENSORS = {"torch", "transformers", "accelerate", "safetensors", "numpy"}
ENGINE_FILES = sorted((ROOT / "mi_runtime").glob("*.py"))
KERNEL_FILES = sorted((ROOT / "mi_runtime" / "kernels").glob("*.py"))
SERVER_FILES = sorted((ROOT / "server").rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in it."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_at_import(path: Path) -> Iterator[str]:
    """Modules of a file's own body: those that importing the file imports."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module or ""


def packages_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules_after_importing(module: str) -> set[str]:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_there_is_something_to_look_at() -> None:
    assert {path.stem for path in ENGINE_FILES} >= {*POLICY, "engine", "worker"}
    assert SERVER_FILES


@pytest.mark.parametrize("path", sorted((ROOT / "mi_runtime").rglob("*.py")), ids=relative)
def test_the_engine_never_imports_the_server(path: Path) -> None:
    assert "server" not in packages_of(path)


@pytest.mark.parametrize("path", SERVER_FILES, ids=relative)
def test_the_server_never_touches_a_tensor(path: Path) -> None:
    assert not TENSORS & packages_of(path)


@pytest.mark.parametrize("path", SERVER_FILES, ids=relative)
def test_the_server_imports_no_engine_module_with_tensors(path: Path) -> None:
    allowed = {
        f"mi_runtime.{name}"
        for name in ("config", "request", "thinking", "grammar", "embedded_pair")
    }
    engine = {name for name in imports_of(path) if name.startswith("mi_runtime")}
    assert {".".join(name.split(".")[:2]) for name in engine} <= allowed


@pytest.mark.parametrize("path", ENGINE_FILES, ids=relative)
def test_the_engine_speaks_token_ids_only(path: Path) -> None:
    foreign = {"tokenizers", "fastapi", "starlette", "uvicorn", "asyncio", "pydantic", "jinja2"}
    assert not foreign & packages_of(path)
    assert not [name for name in imports_of(path) if name.startswith("mi_runtime.embedded_pair")]


@pytest.mark.parametrize("path", sorted((ROOT / "mi_runtime").rglob("*.py")), ids=relative)
def test_only_kernels_import_triton_which_may_be_missing(path: Path) -> None:
    needing = [one for one in KERNEL_FILES if one.name not in ("__init__.py", "choice.py")]
    if path not in needing:
        modules = {f"mi_runtime.kernels.{one.stem}" for one in needing} | {"triton"}
        assert not modules & set(imports_at_import(path))


def test_an_engine_without_a_gpu_never_loads_triton_kernels() -> None:
    assert "mi_runtime.kernels.pair_linear" not in modules_after_importing("mi_runtime.engine")


@pytest.mark.parametrize("module", POLICY)
def test_policy_imports_no_tensors(module: str) -> None:
    path = ROOT / "mi_runtime" / f"{module}.py"
    own = {f"mi_runtime.{name}" for name in POLICY}
    engine = {name for name in imports_of(path) if name.startswith("mi_runtime")}
    assert {".".join(name.split(".")[:2]) for name in engine} <= own
    assert not TENSORS & packages_of(path)


@pytest.mark.parametrize("module", SERVER_POLICY)
def test_the_policy_of_the_server_knows_no_http(module: str) -> None:
    foreign = {"fastapi", "starlette", "uvicorn", "asyncio", "jinja2", "tokenizers"}
    assert not foreign & packages_of(ROOT / "server" / f"{module}.py")


def test_policy_brings_in_no_tensors_when_it_is_imported() -> None:
    modules = modules_after_importing("mi_runtime.planner")
    assert {f"mi_runtime.{name}" for name in POLICY} <= modules
    assert not TENSORS & modules


def test_an_engine_is_imported_without_what_only_grammars_need() -> None:
    assert "llguidance" not in modules_after_importing("mi_runtime.engine")


def test_serving_brings_in_nothing_of_measuring() -> None:
    modules = modules_after_importing("server.app")
    foreign = {"httpx", "matplotlib", "math_verify", "tqdm"}
    assert not [name for name in modules if name.startswith("server.sweep")]
    assert not foreign & modules


def test_naming_the_embedded_pair_brings_in_no_tensors() -> None:
    assert not TENSORS & modules_after_importing("mi_runtime.embedded_pair")
