"""An event loop that stood still: what is sent afterwards goes into no socket that has died."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from channels_rabbitmq._amqp import heartbeat
from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.transport import CoalescingTransport
from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._loops import registry as _registry
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.amqp_proxy import AmqpProxy
from tests.support.log_lines import log_lines
from tests.support.sockets import socket_of
from tools.private_broker import PrivateBroker, TlsFiles

# Most last as long as RabbitMQ is patient with who says nothing.
pytestmark = pytest.mark.slow

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

# With a heartbeat of a second RabbitMQ closes a silent connection after two or three.
HEARTBEAT = "?heartbeat=1"
STANDSTILL = 3.5

# A channel with messages from 0 on, all of which must come
TIMES = 3


async def must_receive(layer: RabbitmqChannelLayer, channel: str, count: int) -> None:
    for n in range(count):
        assert await asyncio.wait_for(layer.receive(channel), 10) == {"n": n}


async def receiver_in_group(open_layer: OpenLayer, **config: Any) -> tuple[Any, str]:
    """Its own connections survive: their heartbeat is long."""
    receiver = await open_layer(**config)
    channel = await receiver.new_channel()
    await receiver.group_add("g", channel)
    return receiver, channel


async def test_nothing_is_lost_after_a_handler_that_blocked(
    open_layer: OpenLayer, broker: Any
) -> None:
    receiver, channel = await receiver_in_group(open_layer)
    sender = await open_layer(host=broker.url + HEARTBEAT)
    await sender.connect()
    for n in range(TIMES):
        time.sleep(STANDSTILL)  # noqa: ASYNC251 - that is what it is about
        await sender.group_send("g", {"n": n})
    await must_receive(receiver, channel, TIMES)
    (statistics,) = sender.statistics()
    assert statistics.publisher.reconnects == TIMES
    assert statistics.counters.outcome_unknown == 0


@pytest.mark.parametrize("to", ["channel", "group"])
async def test_a_close_by_force_during_a_short_standstill_loses_nothing(
    open_layer: OpenLayer, own_broker: PrivateBroker, to: str
) -> None:
    """Much shorter than a heartbeat interval; RabbitMQ's Close lies in the sockets."""
    layer = await open_layer(host=own_broker.url)
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.connect()
    for n in range(TIMES):
        # It blocks the loop for about a second.
        own_broker.close_all_connections("for a test")
        if to == "channel":
            await layer.send(channel, {"n": n})
        else:
            await layer.group_send("g", {"n": n})
        assert await asyncio.wait_for(layer.receive(channel), 10) == {"n": n}
    (statistics,) = layer.statistics()
    assert statistics.counters.outcome_unknown == 0
    assert statistics.publisher.reconnects == TIMES


async def test_a_loop_that_runs_now_and_then_hears_of_a_close_by_force(
    own_broker: PrivateBroker, groups_exchange: str
) -> None:
    layer = RabbitmqChannelLayer(host=own_broker.url, groups_exchange=groups_exchange)

    def send_now_and_then() -> int:
        loop = asyncio.new_event_loop()
        for n in range(TIMES):
            loop.run_until_complete(layer.group_send("g", {"n": n}))
            own_broker.close_all_connections("for a test")
        loop.run_until_complete(layer.group_send("g", {"n": TIMES}))
        (statistics,) = layer.statistics()
        loop.run_until_complete(layer.close())
        loop.close()
        return statistics.counters.outcome_unknown

    assert await asyncio.to_thread(send_now_and_then) == 0


async def test_all_that_is_sent_at_once_after_a_standstill_keeps_its_order(
    open_layer: OpenLayer, broker: Any
) -> None:
    receiver, channel = await receiver_in_group(open_layer)
    sender = await open_layer(host=broker.url + HEARTBEAT)
    await sender.connect()
    time.sleep(STANDSTILL)  # noqa: ASYNC251 - as above
    sending = []
    for n in range(50):  # some before the socket is read, some in the turns in which it is
        sending.append(asyncio.create_task(sender.group_send("g", {"n": n})))
        if n % 3 == 0:
            await asyncio.sleep(0)
    await asyncio.gather(*sending)
    await must_receive(receiver, channel, 50)


async def test_a_loop_that_runs_now_and_then_loses_nothing(
    open_layer: OpenLayer, broker: Any, groups_exchange: str
) -> None:
    receiver, channel = await receiver_in_group(open_layer)
    sender = RabbitmqChannelLayer(host=broker.url + HEARTBEAT, groups_exchange=groups_exchange)

    def send_now_and_then() -> None:
        loop = asyncio.new_event_loop()
        for n in range(TIMES):
            loop.run_until_complete(sender.group_send("g", {"n": n}))
            time.sleep(STANDSTILL)
        loop.run_until_complete(sender.close())
        loop.close()

    await asyncio.to_thread(send_now_and_then)
    await must_receive(receiver, channel, TIMES)


async def test_tls_is_read_first_too(
    open_layer: OpenLayer, private_broker_factory: Callable[..., PrivateBroker], certs: Any
) -> None:
    broker = await asyncio.to_thread(private_broker_factory, tls=TlsFiles.in_folder(certs))
    receiver, channel = await receiver_in_group(open_layer, host=broker.url)
    context = ssl.create_default_context(cafile=str(certs / "ca.pem"))
    sender = await open_layer(host=broker.tls_url + HEARTBEAT, ssl_context=context)
    await sender.connect()
    for n in range(TIMES):
        time.sleep(STANDSTILL)  # noqa: ASYNC251 - as above
        await sender.group_send("g", {"n": n})
    await must_receive(receiver, channel, TIMES)


async def test_a_broker_that_vanished_meanwhile_is_left_before_anything_is_written(
    open_layer: OpenLayer, broker: Any
) -> None:
    """Nothing lies in the socket then, no end either."""
    receiver, channel = await receiver_in_group(open_layer)
    async with AmqpProxy(broker.url) as proxy:
        sender = await open_layer(host=proxy.url + HEARTBEAT)
        await sender.connect()
        proxy.vanish()
        with log_lines() as lines:
            time.sleep(STANDSTILL)  # noqa: ASYNC251 - as above
            await sender.group_send("g", {"n": 0})
            assert "has been silent" in await lines.next("WARNING publisher .*: lost")
        await must_receive(receiver, channel, 1)
        assert sender.statistics()[0].counters.outcome_unknown == 0


async def test_a_standstill_that_the_broker_bears_costs_nothing(
    open_layer: OpenLayer, broker: Any
) -> None:
    receiver, channel = await receiver_in_group(open_layer)
    sender = await open_layer(host=broker.url + "?heartbeat=2")
    await sender.connect()
    for n in range(TIMES):
        time.sleep(2.2)  # noqa: ASYNC251 - as above
        await sender.group_send("g", {"n": n})
    await must_receive(receiver, channel, TIMES)
    assert sender.statistics()[0].publisher.reconnects == 0


async def test_a_pause_without_a_standstill_costs_no_turn_of_the_loop(
    open_layer: OpenLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system says that nothing waits to be read."""
    sender = await open_layer()
    await sender.connect()
    held: list[object] = []
    hold_writers = CoalescingTransport.hold_writers
    monkeypatch.setattr(
        CoalescingTransport, "hold_writers", lambda self: (held.append(self), hold_writers(self))
    )
    for n in range(TIMES):
        await asyncio.sleep(2 * heartbeat.FRESHNESS)
        await sender.group_send("g", {"n": n})
    assert not held


async def test_a_group_is_bound_on_a_connection_that_lives(
    open_layer: OpenLayer, broker: Any
) -> None:
    """``group_add`` of a group that was bound before: what is sent when it returns arrives."""
    sender = await open_layer()
    receiver = await open_layer(host=broker.url + HEARTBEAT)
    channel, second = await receiver.new_channel(), await receiver.new_channel()
    await receiver.group_add("g", channel)
    await sender.connect()
    time.sleep(STANDSTILL)  # noqa: ASYNC251 - as above
    await receiver.group_add("g", second)
    await sender.group_send("g", {"n": 0})
    await must_receive(receiver, second, 1)


@pytest.mark.parametrize("to", ["channel", "group"])
async def test_a_process_hears_itself(open_layer: OpenLayer, broker: Any, to: str) -> None:
    """Both connections are dead; the message waits for the one that receives, too."""
    layer = await open_layer(host=broker.url + HEARTBEAT)
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.connect()
    for n in range(TIMES):
        time.sleep(STANDSTILL)  # noqa: ASYNC251 - as above
        if to == "channel":
            await layer.send(channel, {"n": n})
        else:
            await layer.group_send("g", {"n": n})
        assert await asyncio.wait_for(layer.receive(channel), 10) == {"n": n}


async def test_a_user_gets_a_connection_that_lives(open_layer: OpenLayer, broker: Any) -> None:
    layer = await open_layer(host=broker.url + HEARTBEAT)
    connection = await layer.carehare_connection
    time.sleep(STANDSTILL)  # noqa: ASYNC251 - as above
    connection = await layer.carehare_connection
    await connection.queue_declare("", exclusive=True)


# Without heartbeats


async def test_the_kernel_looks_after_a_connection(broker: Any) -> None:
    """A firewall that has forgotten it is noticed, also where no heartbeats pass."""
    connection = Connection(BrokerUrl.parse(broker.url + "?heartbeat=0"))
    await connection.connect()
    tcp = socket_of(connection)
    try:
        assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        seconds = [
            tcp.getsockopt(socket.IPPROTO_TCP, getattr(socket, option))
            for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        ]
        assert seconds == [30, 10, 3]
    finally:
        await connection.close()


# Loops that nobody runs any more, and nobody closes


@pytest.mark.parametrize("library", ["asyncio", "uvloop"])
async def test_a_loop_that_is_never_closed_keeps_no_connections(
    broker: Any, groups_exchange: str, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """Without heartbeats, which RabbitMQ would miss."""
    new_event_loop = pytest.importorskip(library).new_event_loop
    monkeypatch.setattr(_registry, "LONGEST_STANDSTILL", 0.5)
    monkeypatch.setattr(heartbeat, "INTERVAL_WITHOUT_HEARTBEATS", 0.4)
    async with AmqpProxy(broker.url) as proxy:
        layer = RabbitmqChannelLayer(
            host=proxy.url + "?heartbeat=0", groups_exchange=groups_exchange
        )
        loops = [new_event_loop() for _ in range(3)]

        def send_by_each() -> None:
            for loop in loops:
                loop.run_until_complete(layer.group_send("g", {"n": 0}))
                time.sleep(1)

        try:
            await asyncio.to_thread(send_by_each)
            assert proxy.opened == 3
            await layer.group_send("g", {"n": 0})  # by another loop
            await proxy.until(lambda: len(proxy.links) == 1)

            # They can be run all the same, and lose nothing.
            channel = await layer.new_channel()
            await layer.group_add("g", channel)
            for n in range(2):
                sending = layer.group_send("g", {"n": n})
                await asyncio.to_thread(loops[n].run_until_complete, sending)
                assert await asyncio.wait_for(layer.receive(channel), 10) == {"n": n}
        finally:
            for loop in loops:
                await asyncio.to_thread(loop.close)
            await layer.close()
