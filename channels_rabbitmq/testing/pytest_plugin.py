"""The plugin for pytest: ``pytest_plugins = ["channels_rabbitmq.testing.pytest_plugin"]``.

That line belongs into the ``conftest.py`` at the root, or ``-p`` names the plugin. It isn't loaded
by itself: a suite whose other processes use the project's own exchange must be able to do without.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

from ._run import VARIABLE, Run, begin

_run_key = pytest.StashKey[Run]()
_refused_before = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("channels_rabbitmq")
    group.addoption(
        "--without-rabbitmq",
        choices=["fail", "skip"],
        default=os.environ.get(VARIABLE, "fail"),
        help=f"what tests do whose channel layer finds no RabbitMQ (default: ${VARIABLE}, or fail)",
    )
    parser.addini(
        "channels_rabbitmq_flush",
        "whether channel layers are emptied after each test; without, after the last one",
        type="bool",
        default=True,
    )


def pytest_configure(config: pytest.Config) -> None:
    # Now: the modules of tests make layers when they are collected.
    config.stash[_run_key] = begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _run_key in config.stash:
        config.stash[_run_key].end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    item.stash[_refused_before] = item.config.stash[_run_key].refused_calls
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """Empty the layers when all fixtures of the test have ended, its event loop among them."""
    try:
        return (yield)
    finally:
        if item.config.getini("channels_rabbitmq_flush"):
            item.config.stash[_run_key].reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say why, also of a test that shows no more than a TimeoutError."""
    report = yield
    run = item.config.stash[_run_key]
    if report.failed and run.refused_calls > item.stash[_refused_before]:
        if item.config.getoption("--without-rabbitmq") == "skip":
            report.outcome = "skipped"
            path, line, _ = item.location
            report.longrepr = (path, line or 0, f"Skipped: {run.refusal}")
        else:
            report.sections.append(("channels_rabbitmq", run.refusal))
    return report
