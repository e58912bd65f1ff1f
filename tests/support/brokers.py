"""Which brokers the tests use: $RABBITMQ_URL, or private nodes by RabbitMQ's commands."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.brokers import NoBroker, PrivateNode, get_broker
from tools.private_broker import PrivateBroker, find_broker_commands

_NO_BROKER = (
    "No RabbitMQ: install it, or set RABBITMQ_BIN to the folder with its commands rabbitmq-server "
    "and rabbitmqctl (otherwise looked for on PATH), or RABBITMQ_URL to a broker for tests."
)


@dataclass(frozen=True)
class Broker:
    """The broker of this run. ``private`` is ``None`` if it is somebody's ($RABBITMQ_URL)."""

    url: str
    private: PrivateBroker | None


@contextlib.contextmanager
def obtained_broker() -> Iterator[None]:
    """Get a RabbitMQ where this machine has none: install it, or start it in Docker.

    A container runs as long as the block; the tests find it by $RABBITMQ_URL.
    """
    if os.environ.get("RABBITMQ_URL") or find_broker_commands() is not None:
        yield
        return
    try:
        with contextlib.ExitStack() as stack:
            got = get_broker()
            if not isinstance(got, PrivateNode):  # else its commands are installed now
                stack.enter_context(got)
                os.environ["RABBITMQ_URL"] = got.url
                stack.callback(os.environ.pop, "RABBITMQ_URL")
            yield
    except NoBroker as exc:
        pytest.fail(str(exc), pytrace=False)


def installed_commands() -> Path:
    """The folder with RabbitMQ's commands; fails the test if there is none."""
    commands = find_broker_commands()
    if commands is None:
        pytest.fail(_NO_BROKER, pytrace=False)
    return commands


def broker_commands() -> Path:
    """The same for a test that needs a broker of its own; skips it if only a URL is given."""
    if os.environ.get("RABBITMQ_URL") and not os.environ.get("RABBITMQ_BIN"):
        pytest.skip("needs a broker of its own, but only RABBITMQ_URL is given")
    return installed_commands()
