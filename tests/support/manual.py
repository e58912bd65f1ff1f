"""Reading the manual, README.rst and docs/: its blocks of code by name, its sections, its text.

``block("the-name")`` in a test fetches a block. tests/system/test_manual.py has a test that some
test does so for each of them: it looks for such calls in all modules that import this one.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Awaitable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import docutils.core  # type: ignore[import-untyped]  # has no annotations
import docutils.nodes  # type: ignore[import-untyped]  # as above
from docutils.parsers.rst import Directive, directives, roles  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.rst"
DOCS = ROOT / "docs"
PAGES = [
    path
    for path in sorted(DOCS.rglob("*.rst"))
    if not path.relative_to(DOCS).as_posix().startswith("_build/")
]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in [README, *PAGES])

# The broker of the manual's code, for which the tests put theirs.
URL = "amqp://guest:guest@127.0.0.1"

# What only Sphinx knows. The test that builds the manual looks at it.
_ROLES_OF_SPHINX = ["doc", "download", "ref", "class", "exc", "func", "meth", "mod"]
_DIRECTIVES_OF_SPHINX = ["autoclass", "autoexception", "autofunction", "automodule", "toctree"]


def _text_of_role(
    name: str, rawtext: str, text: str, lineno: int, inliner: object, *_: object
) -> tuple[list[docutils.nodes.Node], list[docutils.nodes.Node]]:
    return [docutils.nodes.inline(rawtext, text)], []


class _LeftOut(Directive):  # type: ignore[misc]  # has no annotations
    optional_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[docutils.nodes.Node]:
        return []


class _Include(_LeftOut):
    """Other files are looked at on their own."""

    option_spec = {"start-after": directives.unchanged, "end-before": directives.unchanged}  # noqa: RUF012


def read_for_pypi(text: str) -> docutils.nodes.document:
    """As PyPI reads README.rst: nothing included, no raw HTML; a warning is an error."""
    overrides = {
        "file_insertion_enabled": False,
        "halt_level": 2,
        "raw_enabled": False,
        "report_level": 2,
        "syntax_highlight": "none",
    }
    return docutils.core.publish_doctree(text, settings_overrides=overrides)


@lru_cache
def documents() -> dict[str, docutils.nodes.document]:
    """README.rst and the pages by their paths from the root. README.rst has nothing of Sphinx."""
    found = {"README.rst": read_for_pypi(README.read_text(encoding="utf-8"))}
    for role in _ROLES_OF_SPHINX:
        roles.register_local_role(role, _text_of_role)
    for directive in _DIRECTIVES_OF_SPHINX:
        directives.register_directive(directive, _LeftOut)
    directives.register_directive("include", _Include)
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        found[path.relative_to(ROOT).as_posix()] = read_for_pypi(text)
    return found


@lru_cache
def blocks() -> dict[str, str]:
    """All literal blocks by name; one without a name is an error."""
    found = [
        node
        for document in documents().values()
        for node in document.findall(docutils.nodes.literal_block)
    ]
    names = [name for node in found for name in node["names"]]
    assert len(set(names)) == len(found), "each block needs a name of its own"
    return dict(zip(names, (node.astext() for node in found), strict=True))


def block(name: str) -> str:
    return blocks()[name]


def commands(name: str) -> list[list[str]]:
    """The lines of a shell block as words."""
    return [shlex.split(line, comments=True) for line in block(name).splitlines()]


def section(title: str) -> docutils.nodes.section:
    """The only section of this title: a page or a part of one."""
    [found] = [
        node
        for document in documents().values()
        for node in [document, *document.findall(docutils.nodes.section)]
        if node.children and _title(node) == title
    ]
    return found


def _title(node: docutils.nodes.Element) -> str | None:
    """docutils makes a document's only section the document itself."""
    for child in node.children:
        if isinstance(child, docutils.nodes.title):
            return str(child.astext())
    return None


def definitions(title: str) -> Iterator[tuple[list[str], str]]:
    """The terms of a section's own definition lists: (literals, what stands in brackets)."""
    for child in section(title).children:
        if isinstance(child, docutils.nodes.definition_list):
            # Those of lists within lists, too.
            for term in child.findall(docutils.nodes.term):
                literals = [node.astext() for node in term.findall(docutils.nodes.literal)]
                _, bracket, remark = term.astext().partition(f"{literals[0]} (")
                yield literals, remark.removesuffix(")") if bracket else ""


def documented_defaults(title: str) -> dict[str, str]:
    return {literals[0]: remark.partition("default ")[2] for literals, remark in definitions(title)}


def plain() -> str:
    """The source of the manual with all white space made one space."""
    return " ".join(TEXT.split())


def lines_of(title: str) -> list[str]:
    """The lines of a section's source."""
    lines = TEXT.splitlines()
    start = lines.index(title)
    underlined = [n for n, line in enumerate(lines) if re.fullmatch(r"(-{3,}|={3,})", line)]
    end = next(n for n in underlined if n > start + 1 and lines[n - 1].strip())
    return lines[start : end - 1]


def run(name: str, *replacements: tuple[str, str]) -> dict[str, Any]:
    """Execute a block in which each (old, new) was replaced; return its names."""
    code = block(name)
    for old, new in replacements:
        code = replaced(code, old, new)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(code, f"the manual, {name}", "exec"), namespace)
    return namespace


def in_thread(name: str, *replacements: tuple[str, str]) -> Awaitable[dict[str, Any]]:
    return asyncio.to_thread(run, name, *replacements)


def replaced(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)
