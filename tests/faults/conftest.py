"""Fixtures for tests of what a user of a broker may do; a module with its own overrides them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.brokers import broker_commands
from tests.support.log_lines import LogLines, log_lines
from tests.support.users import User
from tools.private_broker import PrivateBroker


@pytest.fixture(scope="module")
def own_broker(rabbitmq: None) -> Iterator[PrivateBroker]:
    """One for all tests of a module, which may limit and configure it."""
    with PrivateBroker(broker_commands()) as broker:
        yield broker


@pytest.fixture
def user(own_broker: PrivateBroker) -> User:
    """A user of that broker, with a virtual host of its own."""
    return User(own_broker)


@pytest.fixture
def lines() -> Iterator[LogLines]:
    with log_lines() as lines:
        yield lines
