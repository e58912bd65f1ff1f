"""How Sphinx builds the manual. The extra ``docs`` has what it needs."""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import channels_rabbitmq

REPOSITORY = "https://github.com/CJWorkbench/channels_rabbitmq"
ROOT = Path(__file__).resolve().parent.parent

project = "channels_rabbitmq"
author = "the channels_rabbitmq authors"
project_copyright = author
release = version = channels_rabbitmq.__version__

extensions = ["sphinx.ext.autodoc"]
autodoc_class_signature = "mixed"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90
# Annotations with classes of Python's and carehare's. Their manuals aren't asked: a build needs no
# network.
nitpick_ignore_regex = [("py:.*", r"(?!channels_rabbitmq\.).*")]

exclude_patterns = ["_build"]
nitpicky = True
default_role = None
highlight_language = "none"

html_theme = "furo"
html_title = f"channels_rabbitmq {release}"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}

# Where the files beside README.rst, which pages of docs/project include, link to each other.
PAGES = {
    "ARCHITECTURE.rst": "/project/architecture",
    "CHANGELOG.rst": "/project/changelog",
    "CONTRIBUTING.rst": "/project/contributing",
    "SECURITY.rst": "/project/security",
}


def link_included_files(app: Sphinx, relative_path: Path, parent: str, content: list[str]) -> None:
    """Relative links, which GitHub shows, lead to the pages of the manual or back to GitHub."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        if target in PAGES:
            return f":doc:`{text} <{PAGES[target]}>`"
        return f"`{text} <{REPOSITORY}/blob/main/{target}>`__"

    content[0] = re.sub(r"`([^`<]+?)\s+<([\w./-]+\.\w+)>`__?", link, content[0])


# Pages whose terms, such as options, are found by the search and can be linked to.
PAGES_OF_TERMS = ["operate/log", "reference/methods", "reference/settings", "reference/statistics"]


def index_terms(app: Sphinx, doctree: nodes.document) -> None:
    """Each term of a definition list has an anchor, and a place in the index."""
    if app.env.docname not in PAGES_OF_TERMS:
        return
    for term in list(doctree.findall(nodes.term)):
        for literal in term.findall(nodes.literal):
            name = literal.astext()
            anchor = nodes.make_id(name)
            if anchor in doctree.ids:
                break
            doctree.ids[anchor] = term
            term["ids"].append(anchor)
            doctree.append(addnodes.index(entries=[("single", name, anchor, "main", None)]))
            break


def setup(app: Sphinx) -> None:
    app.connect("include-read", link_included_files)
    app.connect("doctree-read", index_terms)
