"""Every module has a docstring, which says what the module does."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("server", "mi_runtime", "bench", "tests", "docs/tools")


def test_every_module_has_a_docstring() -> None:
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules}
    silent = [path for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
    assert len(modules) > 300
    assert not [str(path.relative_to(ROOT)) for path in silent]
