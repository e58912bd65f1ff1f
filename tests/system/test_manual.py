"""The manual renders, every block of it is run, and its commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import docutils.nodes  # type: ignore[import-untyped]  # has no annotations
import pytest

from tests.support.manual import (
    DOCS,
    README,
    ROOT,
    blocks,
    commands,
    read_for_pypi,
)

# Blocks that no test can run, and why.
BY_HAND = {"capacities": "a drawing"}

SITE = "https://channels-rabbitmq.readthedocs.io/"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_sphinx_builds_it_without_a_warning(tmp_path: Path) -> None:
    """So each link to a page, a section or a class leads somewhere."""
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-n", str(DOCS), str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # An option is found first by the search, and has an anchor.
    index = (tmp_path / "searchindex.js").read_text(encoding="utf-8")
    entries = index[index.index("indexentries") :]
    assert re.search(r'"operation_timeout":\[\[\d+,"operation-timeout",true\]\]', entries)
    settings = (tmp_path / "reference" / "settings.html").read_text(encoding="utf-8")
    assert '<dt id="operation-timeout">' in settings


def test_the_readme_is_short_and_pypi_renders_it() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert read_for_pypi(text).next_node(docutils.nodes.title).astext() == "channels_rabbitmq"


def test_the_readmes_links_to_pages_lead_somewhere() -> None:
    links = re.findall(rf"<{SITE}(.*?)>", README.read_text(encoding="utf-8"))
    assert len(links) > 3
    for link in filter(None, links):
        page = link.removeprefix("en/latest/").removesuffix(".html")
        assert (DOCS / f"{page}.rst").exists(), link


def test_every_block_is_run_or_was_run_by_hand() -> None:
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    source = "".join(text for text in tests if "from tests.support.manual import" in text)
    calls = r'(?:block|commands|run|in_thread)(?:\(|\)\(|, )\s*"([\w-]+)"'
    fetched = set(re.findall(calls, source))
    assert fetched & BY_HAND.keys() == set()
    assert fetched | BY_HAND.keys() == set(blocks())


def test_the_scripts() -> None:
    """They exist and know these options. scripts/test --everything runs scripts/demo --check."""
    programs = {"scripts/demo": "tools.run_demo", "scripts/test": "tools.run_tests"}
    lines = commands("commands") + commands("commands-with-a-broker")
    seen = set()
    for line in lines:
        while "=" in line[0]:
            variable, _, _ = line.pop(0).partition("=")
            assert variable in ("RABBITMQ_URL", "RABBITMQ_BIN")
        command, *arguments = line
        assert os.access(ROOT / command, os.X_OK)
        seen.add(command)
        for argument in arguments:
            if argument.startswith("--"):
                done = subprocess.run(
                    [sys.executable, "-m", programs[command], "--help"],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                assert argument in done.stdout
    assert seen == programs.keys()
