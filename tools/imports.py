"""Which module of a package imports which, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

Imports = dict[str, set[str]]


def read_imports(package: Path) -> Imports:
    """The imports of each module of a package, in functions and behind TYPE_CHECKING, too.

    Modules of the package have their full names, others the name that is imported.
    """
    files = {_module_name(path, package): path for path in package.rglob("*.py")}
    return {name: set(_imports_of(name, path, files)) for name, path in files.items()}


def find_circles(imports: Imports) -> list[list[str]]:
    """The modules that reach themselves, one list for each group that does."""
    reached = {module: _reachable(module, imports) for module in imports}
    circles = {
        tuple(sorted(other for other in reached[module] if module in reached.get(other, ())))
        for module in imports
        if module in reached[module]
    }
    return [list(circle) for circle in sorted(circles)]


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports_of(module: str, path: Path, files: dict[str, Path]) -> Iterator[str]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in files else base


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    kept = parents[: len(parents) - node.level + 1]
    return ".".join([*kept, node.module] if node.module else kept)


def _reachable(module: str, imports: Imports) -> set[str]:
    found: set[str] = set()
    to_visit = list(imports[module])
    while to_visit:
        name = to_visit.pop()
        if name in imports and name not in found:
            found.add(name)
            to_visit += imports[name]
    return found
