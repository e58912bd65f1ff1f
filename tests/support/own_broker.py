"""Brokers for all tests of a module; conftest's ``private_broker`` starts one for each test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from private_broker import find_broker_commands


def broker_commands() -> Path:
    """The folder with RabbitMQ's commands; skips or fails the test as ``private_broker`` does."""
    if os.environ.get("RABBITMQ_URL") and not os.environ.get("RABBITMQ_BIN"):
        pytest.skip("needs a broker of its own, but only RABBITMQ_URL is given")
    commands = find_broker_commands()
    if commands is None:
        pytest.fail("No RabbitMQ: install it, or set RABBITMQ_BIN", pytrace=False)
    return commands
