"""Users of a broker that may do this or that, and what their layers then can and cannot."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import pika  # type: ignore[import-untyped]  # has no annotations
import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.log_lines import LogLines
from tests.support.members import receive
from tools.private_broker import PrivateBroker

Permissions = tuple[str, str, str]  # configure, write, read


# What the manual says, for the groups exchange "groups". (An empty pattern allows nothing.)
# For all that the layer does:
EVERYTHING: Permissions = (r"^(groups|crq\..*)$", r"^(groups|crq\..*)$", r"^(groups|crq\..*)$")


# For a process that only calls send() and group_send(), a Celery worker for instance:
ONLY_PUBLISHING: Permissions = ("^groups$", "^groups$", "")


GROUP = "g"


MESSAGE = {"type": "m"}


PASSWORD = "s3cret"


class User:
    """A user of the broker, and a virtual host of its own."""

    def __init__(self, broker: PrivateBroker) -> None:
        self.broker = broker
        self.name = f"user-{secrets.token_hex(4)}"
        self.vhost = self.name
        self.url = f"amqp://{self.name}:{PASSWORD}@127.0.0.1:{broker.port}/{self.vhost}"
        self.admin_url = f"{broker.url}/{self.vhost}"
        # One command instead of five: each takes its time.
        broker.ctl(
            "eval",
            f"""
            User = <<"{self.name}">>,
            ok = rabbit_vhost:add(User, User),
            ok = rabbit_auth_backend_internal:add_user(User, <<"{PASSWORD}">>, User),
            ok = rabbit_auth_backend_internal:set_permissions(
                <<"guest">>, User, <<".*">>, <<".*">>, <<".*">>, User).
            """,
        )

    def disconnect(self) -> None:
        self.broker.ctl("close_all_user_connections", self.name, "for a test")

    def allow(self, permissions: Permissions) -> None:
        self.broker.ctl("set_permissions", "-p", self.vhost, self.name, *permissions)


def call_as_admin(user: User, method: str, *args: Any, **options: Any) -> None:
    """Call a method of an AMQP channel of pika's."""
    with pika.BlockingConnection(pika.URLParameters(user.admin_url)) as connection:
        getattr(connection.channel(), method)(*args, **options)


async def until_available(call: Callable[[], Awaitable[None]]) -> None:
    """Call until there is a connection; each call waits for one for a while."""

    async def attempts() -> None:
        while True:
            with contextlib.suppress(BrokerUnavailable):
                return await call()
            await asyncio.sleep(0.05)  # It may have failed at once.

    await asyncio.wait_for(attempts(), 20)


async def must_work(layer: RabbitmqChannelLayer) -> None:
    channel = await layer.new_channel()
    await until_available(lambda: layer.group_add(GROUP, channel))
    await until_available(lambda: layer.group_send(GROUP, MESSAGE))
    assert await receive(layer, channel) == MESSAGE
    await layer.send(channel, MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    await layer.group_discard(GROUP, channel)


async def must_be_refused(
    layer: RabbitmqChannelLayer, lines: LogLines, role: str, words: str
) -> None:
    """The error has the broker's ``words`` (a regular expression); one line in the log has them."""
    if role == "subscriber":
        channel = await layer.new_channel()  # it starts to connect
        first = await lines.next("WARNING")
        with pytest.raises(BrokerUnavailable, match=words):
            await layer.group_add(GROUP, channel)
    else:
        with pytest.raises(BrokerUnavailable):
            await layer.group_send(GROUP, MESSAGE)
        first = await lines.next("WARNING")
        with pytest.raises(BrokerUnavailable, match=words):
            await layer.group_send(GROUP, MESSAGE)
    await layer.close()
    assert re.match(f"WARNING {role} .*: cannot connect to amqp://", first)
    assert re.search(words, first)
    others = [line for line in lines.rest() if not line.startswith("INFO")]
    # More attempts were made, and weren't worth a line: the numbers in names aside.
    assert {re.sub(r"\.\d+'", "'", line) for line in others} <= {re.sub(r"\.\d+'", "'", first)}
    assert not [line for line in [first, *others] if "Traceback" in line or PASSWORD in line]
