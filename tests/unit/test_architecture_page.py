"""ARCHITECTURE.rst speaks of files, classes and methods that are there, and of each file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "channels_rabbitmq"
TEXT = (ROOT / "ARCHITECTURE.rst").read_text(encoding="utf-8")
LITERALS = set(re.findall("``([^`]+)``", TEXT))
FILES = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}


def test_it_names_each_file_and_no_other() -> None:
    named = {literal for literal in LITERALS if re.fullmatch(r"[\w/]+\.py", literal)}
    tests = {name for name in named if name.startswith("tests/")}
    assert all((ROOT / name).is_file() for name in tests)
    named -= tests
    names = {path.rpartition("/")[2] for path in FILES if not path.endswith("__init__.py")}
    assert {name.rpartition("/")[2] for name in named} == names
    for name in named:
        assert name in FILES or any(path.endswith(f"/{name}") for path in FILES), name


def test_its_classes_and_methods_are_there() -> None:
    classes: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                functions = (ast.FunctionDef, ast.AsyncFunctionDef)
                methods = {each.name for each in node.body if isinstance(each, functions)}
                classes.setdefault(node.name, set()).update(methods)
    pattern = r"[A-Z][a-z][a-zA-Z]+(\.\w+)?"
    names = {literal for literal in LITERALS if re.fullmatch(pattern, literal)}
    assert len(names) >= 30
    for name in names - {"ChannelFull"}:
        class_name, _, method = name.partition(".")
        assert class_name in classes, name
        assert not method or method in classes[class_name], name
