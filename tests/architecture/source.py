"""The project's own sources, parsed."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_files(*folders: str) -> list[Path]:
    """Every Python file below the folders, which are relative to the project's root."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def services() -> list[str]:
    """The names of the services that are there."""
    return sorted(path.parent.name for path in (ROOT / "services").glob("*/__init__.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """Every call inside a node."""
    for child in ast.walk(node):
        if isinstance(child, ast.Call):
            yield child


def name_of(node: ast.expr) -> str:
    """The last part of a name: ``resolve`` for ``self._credentials.resolve``; empty for anything else."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""
