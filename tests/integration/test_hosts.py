"""Several URLs, one of which leads to a broker."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


async def test_several_hosts_in_one_url_are_tried(open_layer: OpenLayer, broker: Broker) -> None:
    """As an env file may have it: quotes, and a node that is down."""
    parts = urlsplit(broker.url)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        hosts = f"127.0.0.1:{nobody.getsockname()[1]},{parts.hostname}:{parts.port}"
        host = f'"{broker.url.replace(f"{parts.hostname}:{parts.port}", hosts)}"\n'
        layer = await open_layer(host=host)
        channel = await layer.new_channel()
        message: dict[str, Any] = {"type": "test.message"}
        await layer.send(channel, message)
        assert await asyncio.wait_for(layer.receive(channel), 10) == message
