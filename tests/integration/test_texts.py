"""Texts that others have chosen (the system, the broker) stop nothing, whatever they hold."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import quote

import carehare
import pytest

from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.log_lines import log_lines

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

# A Latin-1 é as Python has it if the system's names are UTF-8; no encoding at all; very long
HOST_NAMES = ["caf\udce9", "\ud800", "bücher", "x" * 5000]


@pytest.mark.parametrize("name", HOST_NAMES, ids=["latin-1", "surrogate", "umlaut", "long"])
async def test_the_name_of_the_host(
    open_layer: OpenLayer, broker: Broker, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    layer = await open_layer()
    with log_lines(logging.WARNING) as lines:
        channel = await layer.new_channel()
        await layer.send(channel, {"type": "t"})
        assert await layer.receive(channel) == {"type": "t"}
        assert not lines.rest()
    if broker.private is not None:
        rows = await asyncio.to_thread(broker.private.list_connections)
        id_ = channel.partition("!")[0]
        names = [str(row["client_properties"].get("connection_name")) for row in rows]
        shown = {"caf\udce9": "caf\\udce9", "\ud800": "\\ud800"}.get(name, name[:255])
        assert len([one for one in names if f"{id_} ({shown}, pid " in one]) == 2


async def test_a_virtual_host_whose_name_the_broker_cuts(broker: Broker) -> None:
    """The text of its refusal has 255 bytes at most, the last of which may be half a character."""
    for before in ("", "x"):
        name = before + "é" * 126
        url = BrokerUrl.parse(f"{broker.url.rstrip('/')}/{quote(name)}")
        # RabbitMQ 4.0 to 4.3 end the connection without a word.
        with pytest.raises(
            (carehare.ConnectionClosedByServer, carehare.ConnectionClosed),
            match=f"530 NOT_ALLOWED - vhost {before}ééé|ended the connection during the login",
        ):
            await Connection(url).connect(asyncio.get_running_loop().time() + 10)


@pytest.mark.parametrize("part", ["user", "password"])
async def test_credentials_that_are_too_long_for_the_broker(broker: Broker, part: str) -> None:
    """As tokens are: up to 4.0 it takes 4096 bytes in the handshake, and says nothing beyond."""
    user, password = ("x" * 9000, "guest") if part == "user" else ("guest", "x" * 9000)
    address = broker.url.rpartition("@")[2]
    url = BrokerUrl.parse(f"amqp://{user}:{password}@{address}")
    with pytest.raises(carehare.ConnectionClosed, match=r"during the login: .* may be too long"):
        await Connection(url).connect(asyncio.get_running_loop().time() + 10)
