"""Imports point one way: down the list of packages, and from `server` to `mi_runtime`.

Most tests read the files; some import a module in a fresh interpreter and look at `sys.modules`.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = (
    *("__init__", "exit_codes", "flags", "config", "wire", "text", "routing", "engine", "ops"),
    *("access", "answer", "service", "api", "serve", "merge", "sweep", "cli"),
)
"""Packages and modules of `server`, each importing only what stands before it."""
ENGINE = (
    *("__init__", "errors", "config", "request", "scheduling", "device", "kernels", "attention"),
    *("model", "execution", "engine", "worker", "embedded_pair"),
)
"""The same of `mi_runtime`."""
WITHOUT_TENSORS = ("errors", "config", "request", "scheduling")
TENSORS = {"torch", "transformers", "accelerate", "safetensors", "numpy"}
HTTP = {"fastapi", "starlette", "uvicorn", "asyncio"}
FILES = {name: sorted((ROOT / name).rglob("*.py")) for name in ("server", "mi_runtime")}
ALL = [*FILES["server"], *FILES["mi_runtime"]]
PACKAGES = [
    path.parent for path in ALL if path.name == "__init__.py" and path.parent.parent != ROOT
]
NEEDING_TRITON = {"mi_runtime.kernels.pair_linear", "mi_runtime.kernels.paged_attention"}
NEEDING_TRITON |= {"mi_runtime.attention.triton_backend", "mi_runtime.attention.torch_backend"}


def imports_of(path: Path, *, on_import: bool = False) -> Iterator[str]:
    """Yields the dotted names that a file imports anywhere, or only when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in run_on_import(tree) if on_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module or ""


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what is not in a function, nor for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not function and not for_types:
            yield child
            yield from run_on_import(child)


def roots_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def unit_of(dotted: str) -> str:
    """Returns the package or module directly below `server` or `mi_runtime`."""
    return [*dotted.split("."), "__init__"][1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def sentence(package: Path, start: str) -> str:
    """Returns the sentence of the package's docstring that begins so, or an empty string."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    text = " ".join((docstring or "").split())
    found = re.search(rf"(?:^|[.:] )({start}\b.*?)\.(?= |$)", text)
    return found[1] if found else ""


def names_in(text: str) -> set[str]:
    return set(re.findall(r"`([\w.]+)`", text))


def imported_units(package: Path) -> set[str]:
    """Returns what a package imports: `wire` of its own side, `mi_runtime.request` of the other."""
    own, known = package.parent.name, {"server": SERVER, "mi_runtime": ENGINE}
    units = set()
    for name in (name for path in package.rglob("*.py") for name in imports_of(path)):
        root, unit = name.split(".")[0], unit_of(name)
        if unit in known.get(root, ()) and unit not in ("__init__", package.name):
            units.add(unit if root == own else f"{root}.{unit}")
    return units


def modules_imported_by_others(package: Path) -> set[str]:
    prefix = module_of(package / "x")[:-1]
    names = {
        name.removeprefix(prefix).split(".")[0]
        for path in ALL
        if package not in path.parents
        for name in imports_of(path)
        if name.startswith(prefix)
    }
    return names & {path.stem for path in package.glob("*.py")}


def modules_after_importing(module: str) -> set[str]:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(("package", "order"), [("server", SERVER), ("mi_runtime", ENGINE)])
def test_every_package_has_its_place_in_the_order(package: str, order: tuple[str, ...]) -> None:
    assert {unit_of(module_of(path)) for path in FILES[package]} == set(order)
    assert len(FILES[package]) > len(order)


@pytest.mark.parametrize(("package", "order"), [("server", SERVER), ("mi_runtime", ENGINE)])
def test_no_package_imports_one_above_it(package: str, order: tuple[str, ...]) -> None:
    upward = [
        f"{relative(path)} imports {name}"
        for path in FILES[package]
        for name in imports_of(path)
        if name.startswith(f"{package}.") and unit_of(name) in order
        if order.index(unit_of(name)) > order.index(unit_of(module_of(path)))
    ]
    assert not upward


@pytest.mark.parametrize("package", ["server", "mi_runtime"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    """Counts imports inside packages and inside functions too."""
    modules = {module_of(path).removesuffix(".__init__"): path for path in FILES[package]}
    imported = {
        module: {name for name in imports_of(path) if name in modules} - {module}
        for module, path in modules.items()
    }
    while free := {module for module, others in imported.items() if not others}:
        imported = {
            module: others - free for module, others in imported.items() if module not in free
        }
    assert not imported


@pytest.mark.parametrize("package", ["server", "mi_runtime"])
def test_every_package_has_a_docstring(package: str) -> None:
    packages = [path for path in FILES[package] if path.name == "__init__.py"]
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text())) for path in packages}
    assert not [relative(path) for path, docstring in docstrings.items() if not docstring]


@pytest.mark.parametrize("package", PACKAGES, ids=relative)
def test_the_docstring_of_a_package_lists_what_it_imports(package: Path) -> None:
    """`It imports …` lists packages and modules, or `It imports no other package`."""
    stated = sentence(package, "It imports")
    assert stated
    assert names_in(stated) == imported_units(package)


@pytest.mark.parametrize("package", PACKAGES, ids=relative)
def test_the_docstring_of_a_package_lists_what_others_import_from_it(package: Path) -> None:
    """`Others import only …` or `Others import everything but …` lists modules."""
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    only, but = (
        sentence(package, "Others import only"),
        sentence(package, "Others import everything"),
    )
    stated = names_in(only) if only else modules - names_in(but)
    assert only or but
    assert stated == modules_imported_by_others(package)


@pytest.mark.parametrize("path", FILES["mi_runtime"], ids=relative)
def test_the_engine_never_imports_the_server(path: Path) -> None:
    assert "server" not in roots_of(path)


@pytest.mark.parametrize("path", FILES["server"], ids=relative)
def test_the_server_imports_no_tensors(path: Path) -> None:
    assert not TENSORS & roots_of(path)
    allowed = {*WITHOUT_TENSORS, "embedded_pair"}
    engine = {name for name in imports_of(path) if name.startswith("mi_runtime.")}
    assert {unit_of(name) for name in engine} <= allowed


@pytest.mark.parametrize("path", FILES["server"], ids=relative)
def test_the_server_follows_no_think_block_itself(path: Path) -> None:
    """The engine reports the phase with each token event."""
    assert "mi_runtime.scheduling.thinking" not in set(imports_of(path))


@pytest.mark.parametrize("path", FILES["mi_runtime"], ids=relative)
def test_the_engine_speaks_token_ids_only(path: Path) -> None:
    foreign = {"tokenizers", "pydantic", "jinja2", *HTTP}
    if "embedded_pair" not in path.parts:
        assert not foreign & roots_of(path)
        assert "mi_runtime.embedded_pair" not in set(imports_of(path))


@pytest.mark.parametrize("path", FILES["mi_runtime"], ids=relative)
def test_only_kernels_and_grammars_import_their_libraries_when_imported(path: Path) -> None:
    """Triton may not be installed, and llguidance is slow to import."""
    if module_of(path) not in NEEDING_TRITON:
        later = {"triton", "llguidance", *NEEDING_TRITON}
        assert not later & set(imports_of(path, on_import=True))


@pytest.mark.parametrize("path", FILES["mi_runtime"], ids=relative)
def test_scheduling_imports_no_tensors(path: Path) -> None:
    if unit_of(module_of(path)) in WITHOUT_TENSORS:
        assert not TENSORS & roots_of(path)


@pytest.mark.parametrize("path", sorted((ROOT / "server" / "routing").glob("*.py")), ids=relative)
def test_routing_imports_no_http(path: Path) -> None:
    assert not {"jinja2", "tokenizers", *HTTP} & roots_of(path)


def test_importing_scheduling_loads_no_tensors() -> None:
    modules = modules_after_importing("mi_runtime.scheduling.scheduler")
    modules |= modules_after_importing("mi_runtime.scheduling.planner")
    assert "mi_runtime.scheduling.chunk" in modules
    assert not TENSORS & modules


def test_importing_the_app_loads_nothing_of_the_sweep() -> None:
    modules = modules_after_importing("server.api.app")
    foreign = {"httpx", "matplotlib", "math_verify", "tqdm"}
    assert not [name for name in modules if name.startswith("server.sweep")]
    assert not foreign & modules


def test_importing_the_embedded_pairs_paths_loads_no_tensors() -> None:
    assert not TENSORS & modules_after_importing("mi_runtime.embedded_pair")
