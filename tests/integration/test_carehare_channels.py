"""What users do on a connection: as carehare documents it, without the faults of its 1.0.2.

On a real broker where it can be; each fault is named by what must hold instead.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections.abc import AsyncIterator
from typing import Any

import carehare
import pytest
from pamqp import commands

from channels_rabbitmq._carehare.connection import CarehareConnection
from tests.support.amqp_peer import connected, inside
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy, Frame
from tests.support.brokers import Broker


@pytest.fixture
async def connection(broker: Broker) -> AsyncIterator[CarehareConnection]:
    async with connected(broker.url) as connection:
        yield connection


async def turn() -> None:
    await asyncio.sleep(0)  # lets what was scheduled before run


async def must_work(connection: Any, queue: str) -> None:
    """It declares, publishes and consumes."""
    await connection.queue_declare(f"{queue}-works", exclusive=True)
    await connection.publish(b"works", routing_key=f"{queue}-works")
    async with connection.acking_consumer(f"{queue}-works") as consumer:
        body, tag = await asyncio.wait_for(consumer.next_delivery(), 10)
        consumer.ack(tag)
    assert body == b"works"
    assert not connection.closed.done()


# As documented


async def test_declare_bind_publish_consume_unbind(
    connection: CarehareConnection, queue: str
) -> None:
    exchange = f"{queue}-exchange"
    await connection.exchange_declare(exchange, exchange_type="topic", auto_delete=True)
    await connection.queue_declare(queue, exclusive=True, arguments={"x-max-length": 10})
    await connection.queue_bind(queue, exchange, routing_key="a.*")
    bodies = [b"", b"x", secrets.token_bytes(300_000)]
    for body in bodies:
        await connection.publish(body, exchange_name=exchange, routing_key="a.b")
    got = []
    async with connection.acking_consumer(queue, prefetch_count=1) as consumer:
        async for body in consumer:
            got.append(body)
            if len(got) == len(bodies):
                break
    assert got == bodies

    await connection.queue_bind(queue, exchange, routing_key="other")  # keeps the exchange
    await connection.queue_unbind(queue, exchange, routing_key="a.*")
    await connection.publish(b"unbound", exchange_name=exchange, routing_key="a.b")
    await connection.publish(b"direct", routing_key=queue)
    async with connection.acking_consumer(queue, prefetch_count=5) as consumer:
        # It was not acked: leaving the loop above took it for "not done".
        assert (await consumer.next_delivery())[0] == bodies[-1]
        assert (await consumer.next_delivery())[0] == b"direct"


async def test_refused_message_raises(connection: CarehareConnection, queue: str) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    await connection.queue_declare(queue, exclusive=True, arguments=arguments)
    results = await asyncio.gather(
        *(connection.publish(b"x", routing_key=queue) for _ in range(3)), return_exceptions=True
    )
    assert [type(result) for result in results] == [
        type(None),
        carehare.ServerSentNack,
        carehare.ServerSentNack,
    ]


async def test_refused_declare_raises_and_harms_no_other(
    connection: CarehareConnection, queue: str
) -> None:
    with pytest.raises(carehare.ChannelClosedByServer) as caught:
        await connection.queue_declare(queue, passive=True)
    assert caught.value.reply_code == 404
    await must_work(connection, queue)


async def test_exchange_that_is_missing_and_then_there(
    connection: CarehareConnection, queue: str
) -> None:
    """Its AMQP channel is closed by the broker; the next publish opens another."""
    exchange = f"{queue}-exchange"
    with pytest.raises(carehare.ChannelClosedByServer, match="404"):
        await connection.publish(b"x", exchange_name=exchange)
    await connection.exchange_declare(exchange, auto_delete=True)
    await connection.publish(b"x", exchange_name=exchange)
    await must_work(connection, queue)


# Cancelled callers


async def test_cancelled_publish_leaves_the_connection_up(
    connection: CarehareConnection, queue: str
) -> None:
    """carehare 1.0.2: InvalidStateError when the ack comes, and the connection is killed."""
    await connection.queue_declare(queue, exclusive=True)
    futures = [connection.publish(b"%d" % n, routing_key=queue) for n in range(100)]
    for future in futures[::2]:
        future.cancel()
    await asyncio.gather(*futures[1::2])
    await must_work(connection, queue)
    async with connection.acking_consumer(queue, prefetch_count=100) as consumer:
        assert [int((await consumer.next_delivery())[0]) for _ in range(100)] == list(range(100))


async def test_cancelled_publish_of_a_refused_message_leaves_the_connection_up(
    connection: CarehareConnection, queue: str
) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    await connection.queue_declare(queue, exclusive=True, arguments=arguments)
    futures = [connection.publish(b"x", routing_key=queue) for _ in range(10)]
    for future in futures:
        future.cancel()
    await must_work(connection, queue)


async def test_cancelled_publish_to_a_missing_exchange_leaves_the_connection_up(
    connection: CarehareConnection, queue: str
) -> None:
    futures = [connection.publish(b"x", exchange_name=f"{queue}-missing") for _ in range(3)]
    futures[1].cancel()
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert isinstance(results[0], carehare.ChannelClosedByServer)
    await must_work(connection, queue)


async def test_cancelled_declare_leaves_the_connection_up(
    connection: CarehareConnection, queue: str
) -> None:
    """carehare 1.0.2: as with publish."""
    good = connection.queue_declare(queue, exclusive=True)
    refused = connection.queue_declare(f"{queue}-missing", passive=True)
    good.cancel()
    refused.cancel()
    await must_work(connection, queue)
    await connection.queue_declare(queue, passive=True)  # it was declared all the same


async def test_cancelled_callers_do_not_hide_the_end_of_the_connection(
    proxy: AmqpProxy, queue: str
) -> None:
    """carehare 1.0.2: connection_lost() raises, and ``closed`` never ends."""
    async with connected(proxy.url) as connection:
        await connection.queue_declare(queue, exclusive=True)
        consumer = connection.acking_consumer(queue)
        proxy.stall(TO_CLIENT)
        declared = connection.queue_declare(queue, passive=True)
        published = [connection.publish(b"x", routing_key=queue) for _ in range(3)]
        for future in (declared, published[1], consumer.closed):
            future.cancel()
        proxy.cut()
        await asyncio.wait([connection.closed], timeout=10)
        assert connection.closed.done()
        for future in (published[0], published[2]):
            with pytest.raises(carehare.ConnectionClosed):
                await asyncio.wait_for(future, 10)


async def test_cancelled_closed_of_a_consumer_leaves_it_and_the_connection_up(
    connection: CarehareConnection, queue: str
) -> None:
    """``await wait_for(consumer.closed, ...)`` cancels it; carehare 1.0.2: InvalidStateError."""
    await connection.queue_declare(queue, exclusive=True)
    async with connection.acking_consumer(queue) as consumer:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(consumer.closed, 0.001)
        await connection.publish(b"goes on", routing_key=queue)
        body, tag = await asyncio.wait_for(consumer.next_delivery(), 10)
        assert body == b"goes on"
        consumer.ack(tag)
    await must_work(connection, queue)
    async with connection.acking_consumer(queue) as other:
        await connection.publish(b"the next", routing_key=queue)
        assert (await asyncio.wait_for(other.next_delivery(), 10))[0] == b"the next"


async def test_cancelled_closed_of_a_consumer_that_the_broker_closes(
    connection: CarehareConnection, queue: str
) -> None:
    await connection.queue_declare(queue, exclusive=True)
    consumer = connection.acking_consumer(queue)
    consumer.closed.cancel()
    consumer.ack(9999)
    with pytest.raises(carehare.ChannelClosedByServer):
        await asyncio.wait_for(consumer.next_delivery(), 10)
    await must_work(connection, queue)


async def test_cancelled_next_delivery_loses_no_message(
    connection: CarehareConnection, queue: str
) -> None:
    """carehare 1.0.2: an orphaned task takes the next one."""
    await connection.queue_declare(queue, exclusive=True)
    async with connection.acking_consumer(queue, prefetch_count=10) as consumer:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(consumer.next_delivery(), 0.001)
        for n in range(3):
            await connection.publish(b"m%d" % n, routing_key=queue)
        bodies = [(await asyncio.wait_for(consumer.next_delivery(), 10))[0] for _ in range(3)]
    assert bodies == [b"m0", b"m1", b"m2"]


# More of it than there are


async def test_more_calls_than_amqp_channels(proxy: AmqpProxy, queue: str) -> None:
    """carehare 1.0.2: StopIteration, in a coroutine RuntimeError; the last one is never used."""

    def three_channels(frame: Frame) -> Any:
        tune = frame.decode()
        tune.channel_max = 3
        return tune

    proxy.rule(TO_CLIENT, commands.Connection.Tune, three_channels)
    used: set[int] = set()
    proxy.rule(TO_BROKER, commands.Channel.Open, lambda frame: used.add(frame.channel) or frame)
    async with connected(proxy.url) as connection:
        await asyncio.gather(
            *(connection.queue_declare(f"{queue}-{n}", exclusive=True) for n in range(50))
        )
        assert used == {1, 2, 3}
        await must_work(connection, queue)


# After the end


@pytest.mark.parametrize("end", ["close", "cut"])
async def test_calls_after_the_end_are_refused(proxy: AmqpProxy, queue: str, end: str) -> None:
    """carehare 1.0.2 waits for ever for all but publish."""
    async with connected(proxy.url) as connection:
        await connection.publish(b"x", routing_key=queue)
        if end == "close":
            await connection.close()
        else:
            proxy.cut()
            await asyncio.wait([connection.closed], timeout=10)
        for call in (
            lambda: connection.queue_declare(queue),
            lambda: connection.exchange_declare(queue),
            lambda: connection.queue_bind(queue, "amq.direct"),
            lambda: connection.queue_unbind(queue, "amq.direct"),
        ):
            with pytest.raises(carehare.ConnectionClosed):
                await asyncio.wait_for(call(), 1)
        with pytest.raises(carehare.ConnectionClosed):
            connection.publish(b"x", routing_key=queue)
        with pytest.raises(carehare.ConnectionClosed):
            connection.publish(b"x", exchange_name="another", routing_key=queue)
        with pytest.raises(carehare.ConnectionClosed):
            connection.acking_consumer(queue)


async def test_consumer_ends_with_the_connection(proxy: AmqpProxy, queue: str) -> None:
    async with connected(proxy.url) as connection:
        await connection.queue_declare(queue, exclusive=True)
        consumer = connection.acking_consumer(queue)
        waiting = [asyncio.create_task(consumer.next_delivery()) for _ in range(2)]
        iterating = asyncio.create_task(anext(aiter(consumer)))
        await connection.queue_declare(queue, passive=True)
        proxy.cut()
        for task in (*waiting, iterating):
            with pytest.raises(carehare.ConnectionClosed):
                await asyncio.wait_for(task, 10)
        with pytest.raises(carehare.ConnectionClosed):
            await consumer.closed
        with pytest.raises(carehare.ConnectionClosed):
            await consumer.next_delivery()
        consumer.close()
        consumer.ack(1)


# Consumers


async def test_deleted_queue_ends_its_consumer(connection: CarehareConnection, queue: str) -> None:
    """carehare 1.0.2 doesn't hear of it and waits for ever."""
    await connection.queue_declare(queue, exclusive=True)
    consumer = connection.acking_consumer(queue)
    # Or the queue may be deleted first: two AMQP channels have no order.
    await connection.publish(b"consumed", routing_key=queue)
    body, delivery_tag = await consumer.next_delivery()
    assert body == b"consumed"
    consumer.ack(delivery_tag)
    waiting = asyncio.create_task(consumer.next_delivery())
    await connection._channels.rpc(commands.Queue.Delete(queue=queue, nowait=True))
    with pytest.raises(carehare.ChannelClosed):
        await asyncio.wait_for(waiting, 10)
    with pytest.raises(carehare.ChannelClosed):
        await consumer.closed
    with pytest.raises(carehare.ChannelClosed):
        await consumer.next_delivery()
    await must_work(connection, queue)


async def test_deleted_queue_ends_the_loop_over_it(
    connection: CarehareConnection, queue: str
) -> None:
    await connection.queue_declare(queue, exclusive=True)
    await connection.publish(b"only one", routing_key=queue)
    got = []

    async def consume() -> None:
        async with connection.acking_consumer(queue) as consumer:
            async for body in consumer:
                got.append(body)
                await connection._channels.rpc(commands.Queue.Delete(queue=queue, nowait=True))

    with pytest.raises(carehare.ChannelClosed):
        await consume()
    assert got == [b"only one"]
    await must_work(connection, queue)


async def test_ack_after_the_broker_closed_the_consumer_harms_nobody(
    connection: CarehareConnection, queue: str
) -> None:
    """As after its consumer_timeout; carehare 1.0.2 acks all the same: 504 for the connection."""
    await connection.queue_declare(queue, exclusive=True)
    consumer = connection.acking_consumer(queue, prefetch_count=2)
    await connection.publish(b"x", routing_key=queue)
    _, tag = await consumer.next_delivery()
    consumer.ack(9999)
    with pytest.raises(carehare.ChannelClosedByServer, match="406"):
        await asyncio.wait_for(consumer.next_delivery(), 10)
    consumer.ack(tag)
    consumer.close()
    await must_work(connection, queue)


async def test_loop_over_a_consumer_that_the_broker_closes(
    connection: CarehareConnection, queue: str
) -> None:
    await connection.queue_declare(queue, exclusive=True)
    await connection.publish(b"x", routing_key=queue)

    async def consume() -> None:
        async with connection.acking_consumer(queue) as consumer:
            async for _ in consumer:
                consumer.ack(9999)
                await asyncio.wait([consumer.closed])

    with pytest.raises(carehare.ChannelClosedByServer, match="406"):
        await consume()
    await must_work(connection, queue)


async def test_leaving_a_consumer_closes_its_channel_only(
    connection: CarehareConnection, queue: str
) -> None:
    await connection.queue_declare(queue, exclusive=True)
    for _ in range(3):
        async with connection.acking_consumer(queue) as consumer:
            pass
        assert consumer.closed.result() is None
        with pytest.raises(carehare.ChannelClosed):
            await consumer.next_delivery()
        with pytest.raises(StopAsyncIteration):
            await anext(aiter(consumer))
    await must_work(connection, queue)


async def test_error_inside_a_consumer_is_raised_and_its_message_comes_again(
    connection: CarehareConnection, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    await connection.queue_declare(queue, exclusive=True)
    await connection.publish(b"x", routing_key=queue)

    async def consume() -> None:
        async with connection.acking_consumer(queue) as consumer:
            async for _ in consumer:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await consume()
    async with connection.acking_consumer(queue) as consumer:
        assert (await consumer.next_delivery())[0] == b"x"
    assert not caplog.records  # the caller has the error; carehare 1.0.2 logs it too


async def test_cancelled_exit_of_a_consumer_leaves_the_connection_up(
    proxy: AmqpProxy, queue: str
) -> None:
    async with connected(proxy.url) as connection:
        await connection.queue_declare(queue, exclusive=True)
        consumer = connection.acking_consumer(queue)
        released = proxy.hold(TO_CLIENT, commands.Channel.CloseOk, times=1)

        async def use() -> None:
            async with consumer:
                pass

        leaving = asyncio.create_task(use())
        await proxy.seen(TO_CLIENT, commands.Channel.CloseOk, 2)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        released.set()
        assert await asyncio.wait_for(consumer.closed, 10) is None
        await must_work(connection, queue)


# Publishing, by hand


@pytest.mark.parametrize("options", [{"message": "text"}, {"routing_key": "x" * 256}])
async def test_message_that_cannot_be_written_is_refused_and_harms_nobody(
    connection: CarehareConnection, queue: str, options: dict[str, Any]
) -> None:
    """Half a message would end the connection (505)."""
    await connection.publish(b"before", routing_key=queue)
    with pytest.raises((TypeError, struct.error)):
        connection.publish(**{"message": b"x", "routing_key": queue, **options})
    await connection.publish(b"after", routing_key=queue)
    await must_work(connection, queue)


# The class


@pytest.mark.parametrize("end", ["by us", "by the broker"])
async def test_cancelled_closed_of_the_connection_does_not_break_its_end(
    proxy: AmqpProxy, end: str
) -> None:
    async with connected(proxy.url) as connection:
        connection.closed.cancel()
        if end == "by us":
            await connection.close()
        else:
            proxy.cut()
            await inside(connection).closed
        await turn()
        with pytest.raises(carehare.ConnectionClosed):
            await connection.queue_declare("q")


async def test_closed_of_a_connection_that_rabbitmq_closes_has_its_words(
    proxy: AmqpProxy,
) -> None:
    async with connected(proxy.url) as connection:
        proxy.inject(commands.Connection.Close(320, "CONNECTION_FORCED - bye", 0, 0))
        with pytest.raises(carehare.ConnectionClosedByServer, match="320 CONNECTION_FORCED - bye"):
            await asyncio.wait_for(connection.closed, 10)
