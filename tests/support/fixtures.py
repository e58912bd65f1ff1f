"""Fixtures that tests without a broker and tests with one share: ``conftest`` imports them."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.log_lines import LogLines, log_lines

if TYPE_CHECKING:
    from tests.support.amqp_proxy import AmqpProxy
    from tests.support.brokers import Broker


def shorten_closing(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have a peer that doesn't answer the end of a connection left after so many seconds."""
    from channels_rabbitmq._amqp import connection, protocol  # not with conftest, as there

    for module in (connection, protocol):
        monkeypatch.setattr(module, "CLOSE_TIMEOUT", seconds)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds between attempts, and for a close."""
    from channels_rabbitmq._broker import back_off

    monkeypatch.setattr(back_off, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(back_off, "LONGEST_DELAY", 0.004)
    monkeypatch.setattr(back_off, "LONGEST_DELAY_IF_REFUSED", 0.004)
    shorten_closing(monkeypatch, 0.05)


@pytest.fixture
def short_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that says nothing is left alone sooner than after a second."""
    shorten_closing(monkeypatch, 0.02)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


@pytest.fixture
async def proxy(broker: Broker) -> AsyncIterator[AmqpProxy]:
    """Between a client and the broker."""
    from tests.support.amqp_proxy import AmqpProxy

    async with AmqpProxy(broker.url) as proxy:
        yield proxy


@pytest.fixture
def queue() -> str:
    """The name of a queue that isn't there."""
    return f"test-{secrets.token_hex(8)}"


@pytest.fixture
def lines_without_errors() -> Iterator[LogLines]:
    """The layer's log; in the end the lines that no test took hold no error and no traceback."""
    with log_lines() as lines:
        yield lines
        rest = lines.rest()
        assert not [line for line in rest if line.startswith("ERROR") or "Traceback" in line]


@pytest.fixture
def hooks_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module ``hooks_of_a_test.sub``, empty."""
    package = tmp_path / "hooks_of_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sub.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield package / "sub.py"
    for name in ("hooks_of_a_test", "hooks_of_a_test.sub"):
        sys.modules.pop(name, None)
