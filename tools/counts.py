"""Counts how large and how entangled the code is: ``python -m tools.counts``."""

from __future__ import annotations

import ast
import io
import math
import tokenize
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
# Of tests/support/layers.py: what they return is as private as an attribute with an underscore.
_INSIDES = {
    "inside",
    "inside_of_loop",
    "loop_layers_of",
    "publisher_of",
    "settings_of",
    "subscriber_of",
}
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> int:
    """The lines that hold code: neither blank nor comment nor docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and _is_text(node.value):
            lines.difference_update(_span(node))
    return len(lines)


def function_lengths(tree: ast.AST) -> list[int]:
    """The lines of each function, from ``def`` to its end."""
    return [len(_span(node)) for node in ast.walk(tree) if isinstance(node, _Function)]


def class_lengths(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield len(_span(node)), node.name


def private_accesses(tree: ast.AST) -> int:
    """How often an attribute with one leading underscore is read or set of something else.

    Not of ``self`` and ``cls``, nor of a module that is imported as private. Names in
    ``monkeypatch.setattr(module, "_NAME", ...)`` count too: they are accesses by another way.
    """
    return sum(_is_private_access(node) for node in ast.walk(tree))


def _is_private_access(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        return _is_private(node.attr) and not is_own
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.args[1] if len(node.args) > 1 else None
        return (
            node.func.attr == "setattr"
            and isinstance(name, ast.Constant)
            and _is_private(str(name.value))
        )
    return False


def looks_inside(tree: ast.AST) -> int:
    """How often a helper of the tests is called that returns insides of a layer."""
    return sum(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _INSIDES
        for node in ast.walk(tree)
    )


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _span(node: ast.stmt) -> range:
    assert node.end_lineno is not None
    return range(node.lineno, node.end_lineno + 1)


def percentile_90(values: list[int]) -> int:
    return sorted(values)[math.ceil(len(values) * 0.9) - 1]


def _sources(folder: str) -> dict[Path, str]:
    paths = sorted((_ROOT / folder).rglob("*.py"))
    return {path: path.read_text(encoding="utf-8") for path in paths}


def main() -> None:
    package = _sources("channels_rabbitmq")
    tests = _sources("tests")
    trees = [ast.parse(source) for source in package.values()]
    lengths = [length for tree in trees for length in function_lengths(tree)]
    largest, name = max(pair for tree in trees for pair in class_lengths(tree))
    accesses = {path: private_accesses(ast.parse(source)) for path, source in tests.items()}
    test_lines = sum(len(source.splitlines()) for source in tests.values())
    total = sum(accesses.values())
    looks = sum(looks_inside(ast.parse(source)) for source in tests.values())
    rows = [
        ("code lines of the package", f"{sum(map(code_lines, package.values())):,}"),
        ("modules of the package", f"{len(package)}"),
        ("lines of a function, 90th percentile", f"{percentile_90(lengths)}"),
        ("lines of the longest function", f"{max(lengths)}"),
        ("lines of the largest class", f"{largest} ({name})"),
        ("lines of the tests", f"{test_lines:,}"),
        ("private accesses of the tests", f"{total}"),
        ("the same per 1,000 lines", f"{total / test_lines * 1000:.1f}"),
        ("looks inside by helpers", f"{looks}"),
    ]
    for title, value in rows:
        print(f"{title:38} {value}")
    print("most private accesses:")
    for path, count in sorted(accesses.items(), key=lambda pair: -pair[1])[:8]:
        print(f"{count:6}  {path.relative_to(_ROOT)}")


if __name__ == "__main__":
    main()
