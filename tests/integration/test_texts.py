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

# By the name of a host: what operators see of it.
HOST_NAMES = {
    "caf\udce9": "caf\\udce9",  # a Latin-1 é, as Python has it if the system's names are UTF-8
    "\ud800": "\\ud800",  # no encoding at all
    "bücher": "bücher",
    "x" * 5000: "x" * 255,
}


async def test_the_name_of_the_host(
    open_layer: OpenLayer, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, str] = {}  # by the layer's id
    with log_lines(logging.WARNING) as lines:
        for name in HOST_NAMES:
            monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
            layer = await open_layer()
            await layer.connect()
            channel = await layer.new_channel()
            await layer.send(channel, {"type": "t"})
            assert await layer.receive(channel) == {"type": "t"}
            shown[channel.partition("!")[0]] = HOST_NAMES[name]
        assert not lines.rest()
    if broker.private is not None:
        rows = await asyncio.to_thread(broker.private.list_connections, "client_properties")
        names = [str(row["client_properties"].get("connection_name")) for row in rows]
        for id_, host in shown.items():
            assert len([name for name in names if f"{id_} ({host}, pid " in name]) == 2


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
