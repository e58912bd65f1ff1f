"""Opening and closing a connection, whatever the server does, and what its URL says.

The faults of carehare 1.0.2 are named by what must hold instead.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import carehare
import pytest
from pamqp import commands

from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.publishing import Route
from channels_rabbitmq._amqp.url import BrokerUrl
from tests.support.amqp_peer import (
    connected,
    inside,
)
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy, Frame
from tests.support.brokers import Broker
from tests.support.deadlines import soon
from tests.support.sockets import socket_of
from tools.private_broker import PrivateBroker


def make(url: str, **options: Any) -> Connection:
    return Connection(BrokerUrl.parse(url), **options)


async def must_work(connection: Any, queue: str) -> None:
    await connection.queue_declare(queue, exclusive=True)
    await connection.publish(b"x" * 200_000, routing_key=queue)
    async with connection.acking_consumer(queue) as consumer:
        assert (await asyncio.wait_for(consumer.next_delivery(), 10))[0] == b"x" * 200_000
    assert not connection.closed.done()


# Opening, whatever the server does


async def test_wrong_password_is_told_without_it(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    parts = urlsplit(broker.url)
    url = parts._replace(netloc=f"guest:hush-hush@{parts.hostname}:{parts.port}").geturl()
    connection = make(url)
    with pytest.raises(carehare.ConnectionClosedByServer, match="403 ACCESS_REFUSED") as caught:
        await connection.connect(soon())
    assert "hush" not in caplog.text + str(caught.value) + repr(caught.value) + repr(connection)


async def test_virtual_host_that_is_not_there(broker: Broker) -> None:
    with pytest.raises(carehare.ConnectionClosedByServer, match="530 NOT_ALLOWED"):
        await make(f"{broker.url}/no-such-vhost").connect(soon())


# The socket


async def test_nothing_waits_for_what_was_sent_before_it(broker: Broker) -> None:
    """Nagle's algorithm holds back a small write until the one before it was acknowledged."""
    connection = make(broker.url)
    await connection.connect(soon())
    try:
        tcp = socket_of(connection)
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        await connection.close()


# What the broker offers


def tuned(**limits: int) -> Callable[[Frame], Any]:
    def change(frame: Frame) -> Any:
        tune = frame.decode()
        for name, value in limits.items():
            setattr(tune, name, value)
        return tune

    return change


@pytest.mark.parametrize(
    ("offered", "agreed"),
    [
        ({"channel_max": 0}, {"channel_max": 2047}),
        ({"frame_max": 0}, {"frame_max": 131072}),
        ({"heartbeat": 0}, {"heartbeat": 60}),
        (
            {"channel_max": 0, "frame_max": 0, "heartbeat": 0},
            {"channel_max": 10, "frame_max": 131072},
        ),
    ],
)
async def test_broker_without_limits(
    proxy: AmqpProxy, queue: str, offered: dict[str, int], agreed: dict[str, int]
) -> None:
    """0 means "no limit", and "no heartbeats".

    carehare 1.0.2, for one after the other: RuntimeError at the first call, ValueError in
    publish(), ConnectionClosedByHeartbeatMonitor at once.
    """
    # Rewritten both ways: the broker, which offered something else, has to agree.
    proxy.rule(TO_CLIENT, commands.Connection.Tune, tuned(**offered))
    proxy.rule(TO_BROKER, commands.Connection.TuneOk, tuned(**agreed))
    async with connected(proxy.url) as connection:
        await must_work(connection, queue)


# The URL


async def test_real_broker_takes_percent_encoded_credentials(broker: Broker) -> None:
    if broker.private is None:
        pytest.skip("$RABBITMQ_URL may have other credentials than guest and guest")
    for there in ("%67uest:%67uest@", ""):
        async with connected(broker.url.replace("guest:guest@", there)) as connection:
            assert inside(connection).is_open


# Names, and whether publishers are blocked


async def test_blocked_publishers_are_told_and_the_connection_stays_up(
    proxy: AmqpProxy, queue: str
) -> None:
    """carehare 1.0.2 doesn't offer to understand it, and is killed by it."""
    told: asyncio.Queue[str | None] = asyncio.Queue()
    async with connected(proxy.url) as connection:
        inside(connection).on_blocked = told.put_nowait
        proxy.inject(commands.Connection.Blocked("low on memory"))
        assert await told.get() == "low on memory"
        proxy.inject(commands.Connection.Unblocked())
        assert await told.get() is None
        await must_work(connection, queue)


async def test_memory_alarm_is_told_to_connections_that_publish(
    private_broker: PrivateBroker,
) -> None:
    told: asyncio.Queue[str | None] = asyncio.Queue()
    connection = make(private_broker.url)
    await connection.connect(soon())
    connection.on_blocked = told.put_nowait
    publisher = connection.open_publisher(on_end=lambda exc: None)
    await asyncio.to_thread(private_broker.raise_memory_alarm)
    publisher.publish(b"", Route("", "none", mandatory=False), soon(30))
    assert await asyncio.wait_for(told.get(), 20)
    await asyncio.to_thread(private_broker.end_memory_alarm)
    assert await asyncio.wait_for(told.get(), 20) is None
    await connection.close()


# Closing


async def test_end_by_the_server_without_a_word_is_an_error(proxy: AmqpProxy) -> None:
    """carehare 1.0.2 takes it for a close of its own."""
    async with connected(proxy.url) as connection:
        proxy.cut(reset=False)
        with pytest.raises(carehare.ConnectionClosed):
            await asyncio.wait_for(connection.closed, 10)


async def test_close_says_goodbye(proxy: AmqpProxy) -> None:
    async with connected(proxy.url) as connection:
        await connection.close()
        assert proxy.count(TO_BROKER, commands.Connection.Close) == 1
        assert proxy.count(TO_CLIENT, commands.Connection.CloseOk) == 1
        assert await connection.closed is None
        assert inside(connection).closed.result() is None
        assert not inside(connection).is_open
        await connection.close()
    assert proxy.count(TO_BROKER, commands.Connection.Close) == 1


@pytest.mark.usefixtures("short_close")
async def test_close_does_not_wait_for_ever_for_the_answer(proxy: AmqpProxy) -> None:
    """carehare 1.0.2 waits for the heartbeat monitor, if there is one."""
    proxy.drop(TO_CLIENT, commands.Connection.CloseOk)
    async with connected(proxy.url) as connection:
        await asyncio.wait_for(connection.close(), 5)
        assert await asyncio.wait_for(connection.closed, 5) is None
    await proxy.until(lambda: not proxy.links)


async def test_cancelled_close_closes_the_socket_at_once(proxy: AmqpProxy) -> None:
    """carehare 1.0.2: ``closed`` is cancelled, and connection_lost() raises."""
    async with connected(proxy.url) as connection:
        proxy.drop(TO_CLIENT, commands.Connection.CloseOk)
        closing = asyncio.create_task(connection.close())
        await proxy.seen(TO_BROKER, commands.Connection.Close)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await proxy.until(lambda: not proxy.links)
        await asyncio.wait([connection.closed], timeout=5)
        assert not connection.closed.cancelled()
        assert connection.closed.result() is None


async def test_cancelled_closed_harms_nobody(proxy: AmqpProxy, queue: str) -> None:
    """``wait_for(connection.closed, ...)`` cancels it. The connection is as open as before."""
    async with connected(proxy.url) as connection:
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await asyncio.wait_for(connection.closed, 0.001)
        await connection.queue_declare(queue, exclusive=True)
        await connection.publish(b"goes on", routing_key=queue)
        async with connection.acking_consumer(queue) as consumer:
            assert (await consumer.next_delivery())[0] == b"goes on"
        await asyncio.wait_for(connection.close(), 5)
        assert proxy.count(TO_BROKER, commands.Connection.Close) == 1
    await proxy.until(lambda: not proxy.links)


async def test_close_by_several_at_once(proxy: AmqpProxy) -> None:
    async with connected(proxy.url) as connection:
        await asyncio.wait_for(asyncio.gather(*(connection.close() for _ in range(5))), 10)
    assert proxy.count(TO_BROKER, commands.Connection.Close) == 1


async def test_close_of_a_connection_that_was_lost_or_never_made(proxy: AmqpProxy) -> None:
    never = make("amqp://broker")
    assert not never.is_open
    await never.close()
    async with connected(proxy.url) as connection:
        proxy.cut()
        await asyncio.wait([connection.closed], timeout=10)
        await connection.close()
        assert not inside(connection).is_open


async def test_end_while_closing_is_no_error(proxy: AmqpProxy) -> None:
    async with connected(proxy.url) as connection:
        proxy.rule(TO_BROKER, commands.Connection.Close, lambda frame: frame.link.cut(reset=False))
        await asyncio.wait_for(connection.close(), 5)
        assert await asyncio.wait_for(connection.closed, 5) is None


async def test_async_with_uses_the_open_connection_and_closes_it(
    proxy: AmqpProxy, queue: str
) -> None:
    async with connected(proxy.url) as connection:
        await connection.connect()  # It is connected.
        async with connection as same:
            assert same is connection
            await must_work(connection, queue)
        assert connection.closed.result() is None
    assert proxy.count(TO_CLIENT, commands.Connection.OpenOk) == 1


async def test_what_waits_when_the_connection_is_closed_is_answered(
    broker: Broker, queue: str
) -> None:
    async with connected(broker.url) as connection:
        calls = [
            connection.queue_declare(queue, exclusive=True),
            connection.publish(b"x", routing_key=queue),
            inside(connection)
            .open_topology()
            .call(commands.Queue.Declare(queue=queue, passive=True)),
        ]
        consumer = connection.acking_consumer(queue)
        waiting = asyncio.create_task(consumer.next_delivery())
        await connection.close()
        done, pending = await asyncio.wait([*calls, waiting], timeout=10)
        assert not pending
        await asyncio.gather(*done, return_exceptions=True)
