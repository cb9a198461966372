"""Collecting the tests stays fast: no test module imports a heavy library at its top.

Each pytest process collects every test module, and scripts/check starts one per core. A library that is imported inside
the tests that use it costs only the process that runs them. The imports are read from the source, so that nothing here
has to import what it forbids; those of a module's own modules (tests, scripts, qexp) count as its own.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each takes 0.2 to 4 seconds to import. hypothesis does, too, but its decorators have to be there at collection.
HEAVY = {
    "accelerate", "bitsandbytes", "diffusers", "matplotlib", "numba", "optimum", "peft", "scipy", "sklearn", "torchao",
    "torchmetrics", "transformers", "wandb", "wandb_workspaces",
}  # fmt: skip
# pytest's own files; a helper that they import late, inside their tests, may import at its top what it likes
COLLECTED = [path for pattern in ("test_*.py", "conftest.py") for path in sorted((ROOT / "tests").rglob(pattern))]


def test_no_heavy_library_is_imported_at_collection() -> None:
    chains = {path: chain_to_heavy(path) for path in COLLECTED}
    found = [" imports ".join([path.stem, *chain]) for path, chain in chains.items() if chain]
    assert not found, "import these inside the functions that use them:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "imports"),
    [
        ("import a.b, c", ["a.b", "c"]),
        ("from a import b", ["a", "a.b"]),
        ("try:\n    import a\nexcept ImportError:\n    import b", ["a", "b"]),
        ("class A:\n    import a\n    def f(self):\n        import b", ["a"]),
        ("def f():\n    import a", []),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b", ["b"]),
    ],
)
def test_imports_that_run_with_the_module(source: str, imports: list[str]) -> None:
    assert list(top_imports(ast.parse(source))) == imports


def chain_to_heavy(start: Path) -> list[str]:
    """Return the shortest chain of imports from a module to a heavy library; an empty list if there is none."""
    chains: dict[Path, list[str]] = {start: []}
    waiting = [start]
    while waiting:
        path = waiting.pop(0)
        for name in imports_of(path):
            chain = [*chains[path], name]
            if name.partition(".")[0] in HEAVY:
                return chain
            found = [file for file in files_of(name) if file not in chains]
            chains.update(dict.fromkeys(found, chain))
            waiting += found
    return []


@cache
def imports_of(path: Path) -> list[str]:
    return list(top_imports(ast.parse(path.read_text(encoding="utf-8"))))


def top_imports(node: ast.AST) -> Iterator[str]:
    """Yield the names of modules (and of what is imported from them) that are imported when a module itself is."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.module and not node.level, "the project has no relative imports"
        yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        types_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.orelse if types_only else ast.iter_child_nodes(node):
            yield from top_imports(child)


@cache
def files_of(name: str) -> list[Path]:
    """Return the files that run when one of the project's own modules is imported: its packages' and its own.

    Tests import scripts without the name of their folder.
    """
    parts = name.split(".")
    stems = [folder.joinpath(*parts[:n]) for folder in (ROOT, ROOT / "scripts") for n in range(1, len(parts) + 1)]
    files = [file for stem in stems for file in (stem / "__init__.py", stem.with_suffix(".py"))]
    return [file for file in files if file.is_file()]
