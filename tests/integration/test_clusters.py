"""Several nodes: a list of URLs, or one host name with several addresses."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable

import pytest

from channels_rabbitmq._broker import back_off as _back_off
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.amqp_proxy import AmqpProxy
from tests.support.brokers import Broker
from tests.support.layers import publisher_of
from tests.support.log_lines import log_lines
from tests.support.name_server import serve_names
from tools.private_broker import free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}


async def test_a_node_that_is_down_is_passed_over(open_layer: OpenLayer, broker: Broker) -> None:
    down = [f"amqp://guest:guest@127.0.0.1:{free_port()}" for _ in range(3)]
    for _ in range(5):  # the order is drawn anew each time
        layer = await open_layer(host=[*down, broker.url])
        await layer.group_send("g", MESSAGE)


async def test_when_a_node_goes_down_the_next_one_serves(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as one, AmqpProxy(broker.url) as two:
        layer = await open_layer(host=[one.url, two.url])
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        (node,) = [proxy for proxy in (one, two) if proxy.named("subscriber")]
        other = two if node is one else one
        with log_lines() as lines:
            node.refuse()
            node.cut()
            await lines.next("WARNING subscriber .*: lost")
            await lines.next(f"WARNING subscriber .*: connected again to .*:{other.port}")
        await layer.group_send("g", MESSAGE)
        assert await layer.receive(channel) == MESSAGE


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has 127.0.0.1 only")
@pytest.mark.parametrize("answers", [True, False])
async def test_each_address_of_a_name_is_tried_whatever_the_first_one_does(
    open_layer: OpenLayer, broker: Broker, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        accepted: list[asyncio.StreamWriter] = []

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.append(writer)  # and nothing more
            if answers:
                writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        sick = await asyncio.start_server(accept, "127.0.0.2", proxy.port)
        serve_names(monkeypatch, cluster=lambda: ["127.0.0.2", "127.0.0.1"])
        try:
            layer = await open_layer(
                host=proxy.url.replace("127.0.0.1", "cluster.test"), connect_timeout=2
            )
            await layer.group_send("g", MESSAGE)
            assert (len(accepted), proxy.opened) == (1, 1)
        finally:
            sick.close()
            for writer in accepted:
                writer.close()


async def test_the_connection_that_is_back_first_saves_the_other_its_back_off(
    open_layer: OpenLayer, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        await layer.send(channel, MESSAGE)
        assert await layer.receive(channel) == MESSAGE
        # So long that nobody would be back by himself in this test.
        monkeypatch.setattr(_back_off, "FIRST_DELAY", 300.0)
        monkeypatch.setattr(_back_off, "LONGEST_DELAY", 300.0)
        with log_lines(logging.DEBUG) as lines:
            proxy.cut()
            for _ in range(2):
                await lines.next("DEBUG .*: reconnecting in")
            publisher_of(layer).supervisor.retry_now()
            await lines.next("WARNING publisher .*: connected again")
            await lines.next("WARNING subscriber .*: connected again")
        await layer.send(channel, MESSAGE)
        assert await layer.receive(channel) == MESSAGE
