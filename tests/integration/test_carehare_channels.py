"""What users do on a connection: as carehare documents it, without the faults of its 1.0.2.

On a real broker where it can be; each fault is named by what must hold instead.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import secrets
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import carehare
import pytest
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

import channels_rabbitmq
from channels_rabbitmq._amqp.channel_ids import ChannelIds
from channels_rabbitmq._carehare.connection import CarehareConnection
from channels_rabbitmq._carehare.consumer import AckingConsumer
from tests.support.amqp_peer import Peer, close_channel, connected, content, delivery, plain
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy, Frame
from tests.support.brokers import Broker


@pytest.fixture
async def connection(broker: Broker) -> AsyncIterator[CarehareConnection]:
    async with connected(broker.url) as connection:
        yield connection


@pytest.fixture
async def proxy(broker: Broker) -> AsyncIterator[AmqpProxy]:
    async with AmqpProxy(broker.url) as proxy:
        yield proxy


@pytest.fixture
def queue() -> str:
    return f"test-{secrets.token_hex(8)}"


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


async def test_refused_call_ends_without_an_answer_to_its_close() -> None:
    """RabbitMQ 4.0 forgets it now and then; carehare waits for ever."""
    peer = Peer(channel_max=1)
    refused = peer.user.rpc(commands.Queue.Declare(queue="q"))
    waiting = peer.user.rpc(commands.Queue.Declare(queue="other"))
    peer.feed(commands.Channel.OpenOk(), close_channel(), channel=1)
    with pytest.raises(carehare.ChannelClosedByServer, match="404"):
        await refused
    # The number is free once that answer has come: it could be taken for another call's.
    assert [frame.name for _, frame in peer.taken()].count("Queue.Declare") == 1
    peer.feed(commands.Channel.CloseOk(), channel=1)
    assert [frame.name for _, frame in peer.taken()].count("Queue.Declare") == 1
    peer.feed(commands.Channel.OpenOk(), commands.Channel.CloseOk(), channel=1)
    await waiting
    await peer.lost()


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


async def test_calls_that_wait_for_an_amqp_channel_end_with_the_connection() -> None:
    peer = Peer(channel_max=2)
    calls = [peer.user.rpc(commands.Queue.Declare(queue="q", nowait=True)) for _ in range(5)]
    calls[3].cancel()
    await peer.lost()
    for call in (*calls[:3], calls[4]):
        with pytest.raises(carehare.ConnectionClosed):
            await asyncio.wait_for(call, 1)


async def test_calls_that_wait_for_an_amqp_channel_start_in_order() -> None:
    peer = Peer(channel_max=1)
    calls = [peer.user.rpc(commands.Queue.Declare(queue=f"q{n}", nowait=True)) for n in range(3)]
    for n in range(3):
        written = [frame for _, frame in peer.taken()]
        assert [frame.queue for frame in written if frame.name == "Queue.Declare"] == [f"q{n}"]
        peer.feed(commands.Channel.OpenOk(), commands.Channel.CloseOk(), channel=1)
        assert calls[n].result() is None
    await peer.lost()


async def test_no_amqp_channel_left_for_a_consumer_or_an_exchange() -> None:
    peer = Peer(channel_max=1)
    peer.user.acking_consumer("q", prefetch_size=0, prefetch_count=1)
    with pytest.raises(carehare.ChannelClosed, match="in use"):
        peer.user.acking_consumer("q", prefetch_size=0, prefetch_count=1)
    with pytest.raises(carehare.ChannelClosed, match="in use"):
        peer.user.publish(b"x", exchange_name="", routing_key="q")
    await peer.lost()


def test_amqp_channel_numbers_are_used_up_and_again() -> None:
    ids = ChannelIds(3)
    assert [ids.acquire() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(carehare.ChannelClosed):
        ids.acquire()
    used: list[int | None] = []
    ids.acquire_later(used.append)
    ids.acquire_later(used.append)
    assert used == []
    ids.release(2)
    assert used == [2]
    ids.close()
    assert used == [2, None]
    ids.release(2)
    assert ids.acquire() == 2


@pytest.mark.parametrize("channel_max", [0, 65535])
def test_channel_max_of_zero_is_no_limit_but_that_of_the_number(channel_max: int) -> None:
    ids = ChannelIds(channel_max)
    for _ in range(65535):
        last = ids.acquire()
    assert last == 65535
    with pytest.raises(carehare.ChannelClosed):
        ids.acquire()


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


async def test_cancelled_consumer_gives_its_amqp_channel_back() -> None:
    peer = Peer(channel_max=1)
    consumer = peer.user.acking_consumer("q", prefetch_size=0, prefetch_count=2)
    peer.taken()
    peer.feed(commands.Channel.OpenOk(), commands.Basic.QosOk(), channel=1)
    peer.feed(*delivery(1, b"came before"), commands.Basic.Cancel("carehare"), channel=1)
    assert peer.names() == [(1, "Channel.Close")]
    # What came before the end is not lost, though it can't be acked any more.
    assert await consumer.next_delivery() == (b"came before", 1)
    consumer.ack(1)
    with pytest.raises(carehare.ChannelClosed):
        await consumer.next_delivery()
    assert peer.names() == []
    peer.feed(commands.Channel.CloseOk(), channel=1)
    call = peer.user.rpc(commands.Queue.Declare(queue="q", nowait=True))
    assert peer.names()[0] == (1, "Channel.Open")
    peer.feed(commands.Channel.OpenOk(), commands.Channel.CloseOk(), channel=1)
    assert call.result() is None
    await peer.lost()


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
    assert not caplog.records  # whoever called has the error; carehare 1.0.2 logs it too


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


class Consumption:
    """A user's consumer on a Peer."""

    def __init__(self) -> None:
        self.peer = Peer()
        self.consumer: AckingConsumer = self.peer.user.acking_consumer(
            "q", prefetch_size=0, prefetch_count=10
        )
        self.peer.feed(commands.Channel.OpenOk(), commands.Basic.QosOk(), channel=1)
        self.peer.taken()

    def deliver(self, *tags: int) -> None:
        for tag in tags:
            self.peer.feed(*delivery(tag, b"body"), channel=1)


async def test_message_that_comes_when_its_reader_is_cancelled_goes_to_the_next() -> None:
    bench = Consumption()
    readers = [asyncio.create_task(bench.consumer.next_delivery()) for _ in range(3)]
    await turn()
    bench.deliver(1, 2)  # wakes the first two
    readers[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await readers[0]
    assert [(await reader)[1] for reader in readers[1:]] == [1, 2]
    await bench.peer.lost()


async def test_readers_are_served_in_order() -> None:
    bench = Consumption()
    readers = [asyncio.create_task(bench.consumer.next_delivery()) for _ in range(3)]
    await turn()
    for tag in (1, 2, 3):
        bench.deliver(tag)
        assert (await readers[tag - 1])[1] == tag
    await bench.peer.lost()


async def test_polling_an_idle_queue_leaves_nothing_behind() -> None:
    bench = Consumption()
    for _ in range(50):
        reader = asyncio.create_task(bench.consumer.next_delivery())
        await turn()
        reader.cancel()
        await asyncio.wait([reader])
    assert not bench.consumer._waiters
    bench.deliver(1)
    assert await bench.consumer.next_delivery() == (b"body", 1)
    await bench.peer.lost()


async def test_delivery_in_many_frames_and_an_empty_one() -> None:
    bench = Consumption()
    body = bytes(range(256)) * 10
    bench.peer.feed(*delivery(1, body, pieces=7), *delivery(2, b""), channel=1)
    assert await bench.consumer.next_delivery() == (body, 1)
    assert await bench.consumer.next_delivery() == (b"", 2)
    await bench.peer.lost()


DELIVER = delivery(1, b"abc")[0]


@pytest.mark.parametrize(
    "frames",
    [
        [ContentHeader(body_size=3)],
        [ContentBody(b"x")],
        [DELIVER, ContentBody(b"x")],
        [DELIVER, ContentHeader(body_size=3), ContentHeader(body_size=3)],
        [DELIVER, DELIVER],
        [DELIVER, commands.Basic.QosOk()],
        [commands.Basic.Ack(1)],
        [commands.Queue.BindOk()],
    ],
)
async def test_frame_out_of_place_ends_the_connection(frames: list[Any]) -> None:
    bench = Consumption()
    bench.peer.feed(*frames, channel=1)
    assert [frame.reply_code for _, frame in bench.peer.taken()] == [505]
    assert isinstance(await bench.peer.protocol.closed, carehare.BadBytesFromServer)
    with pytest.raises(carehare.ConnectionClosed):
        await bench.consumer.next_delivery()


@pytest.mark.parametrize("frame", [commands.Queue.BindOk(), ContentBody(b"x"), Heartbeat()])
async def test_unexpected_answer_to_a_call_ends_the_connection(frame: Any) -> None:
    peer = Peer()
    call = peer.user.rpc(commands.Queue.Declare(queue="q", nowait=True))
    peer.taken()
    heartbeat_there = b"\x08\0\x01\0\0\0\0\xce"
    peer.feed(heartbeat_there if isinstance(frame, Heartbeat) else frame, channel=1)
    assert [frame.reply_code in (503, 505) for _, frame in peer.taken()] == [True]
    await peer.protocol.closed
    with pytest.raises(carehare.ConnectionClosed):
        await call


# Publishing, by hand


async def test_confirms_of_users_messages_in_any_order() -> None:
    peer = Peer()
    futures = [peer.user.publish(b"x", exchange_name="", routing_key="q") for _ in range(6)]
    futures[4].cancel()
    ack, nack = commands.Basic.Ack, commands.Basic.Nack
    peer.feed(commands.Channel.OpenOk(), nack(3), ack(2, multiple=True), channel=1)
    assert [future.done() for future in futures] == [True, True, True, False, True, False]
    # One that nobody knows, and one more than once.
    peer.feed(ack(99), ack(3), nack(6, multiple=True), channel=1)
    results = await asyncio.gather(*futures, return_exceptions=True)
    nacked = carehare.ServerSentNack
    types = [type(result) for result in results]
    assert types == [type(None), type(None), nacked, nacked, asyncio.CancelledError, nacked]
    assert not peer.transport.is_closing()
    await peer.lost()


@pytest.mark.parametrize("frame_max", [4096, 0])
@pytest.mark.parametrize("size", [0, 1, 4087, 4088, 4089, 10_000])
async def test_body_frames_of_users_fit_into_frame_max(frame_max: int, size: int) -> None:
    """carehare 1.0.2 leaves no room for the 8 bytes around them, and fails over "no limit"."""
    peer = Peer(frame_max=frame_max)
    body = bytes(n % 251 for n in range(size))
    peer.user.publish(body, exchange_name="", routing_key="q")
    frames = [frame for _, frame in peer.taken()]
    assert [plain(frame)[0] for frame in frames[:4]] == [
        "Channel.Open",
        "Confirm.Select",
        "Basic.Publish",
        "header",
    ]
    assert b"".join(frame.value for frame in frames[4:]) == body
    assert all(len(frame.value) <= (frame_max or 10**6) - 8 for frame in frames[4:])
    await peer.lost()


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


async def test_call_that_cannot_be_written_is_refused_and_harms_nobody() -> None:
    """Also when it would have to wait for an AMQP channel, which stays free."""
    peer = Peer(channel_max=1)
    for _ in range(2):
        bad = commands.Queue.Bind(queue="q", exchange="e", routing_key="x" * 256, nowait=True)
        with pytest.raises((TypeError, struct.error)):
            peer.user.rpc(bad)
        with pytest.raises(TypeError):
            peer.user.acking_consumer("q", prefetch_size=0, prefetch_count=10**6)
        good = peer.user.rpc(commands.Queue.Declare(queue="q", nowait=True))
        with pytest.raises((TypeError, struct.error)):
            peer.user.rpc(bad)
        peer.feed(commands.Channel.OpenOk(), commands.Channel.CloseOk(), channel=1)
        assert good.result() is None
    await peer.lost()


async def test_refused_exchange_fails_all_its_messages_and_no_others() -> None:
    peer = Peer()
    lost = [peer.user.publish(b"x", exchange_name="gone", routing_key="q") for _ in range(3)]
    other = peer.user.publish(b"x", exchange_name="there", routing_key="q")
    lost[0].cancel()
    peer.feed(commands.Channel.OpenOk(), close_channel(404, "NOT_FOUND - gone"), channel=1)
    for future in lost[1:]:
        with pytest.raises(carehare.ChannelClosedByServer, match="NOT_FOUND - gone"):
            await future
    peer.feed(commands.Channel.OpenOk(), commands.Basic.Ack(1), channel=2)
    assert other.result() is None
    again = peer.user.publish(b"x", exchange_name="gone", routing_key="q")
    peer.feed(commands.Channel.OpenOk(), commands.Basic.Ack(1), channel=1)
    assert again.result() is None
    await peer.lost()


@pytest.mark.parametrize(
    "frames", [content(b"x"), [commands.Basic.Return(312, "", "", "")], [commands.Basic.Cancel("")]]
)
async def test_unexpected_frame_on_an_exchanges_channel_ends_the_connection(
    frames: list[Any],
) -> None:
    peer = Peer()
    future = peer.user.publish(b"x", exchange_name="", routing_key="q")
    peer.taken()
    peer.feed(*frames, channel=1)
    assert [frame.reply_code for _, frame in peer.taken()] == [505]
    await peer.protocol.closed
    with pytest.raises(carehare.ConnectionClosed):
        await future


# The class


def _public(owner: type) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


def test_every_public_method_of_carehares_is_ours_and_called_as_there() -> None:
    """If this fails, a release of carehare has a method more, or another parameter."""
    assert issubclass(CarehareConnection, carehare.Connection)
    for name in {*_public(carehare.Connection), "__aenter__", "__aexit__"}:
        ours, theirs = vars(CarehareConnection)[name], vars(carehare.Connection)[name]
        if name in ("closed", "__aexit__"):
            continue
        expected = inspect.signature(theirs).parameters.values()
        found = inspect.signature(ours).parameters.values()
        assert [(each.name, each.kind, each.default) for each in found] == [
            (each.name, each.kind, each.default) for each in expected
        ], name


def test_nothing_of_carehares_own_protocol_is_imported() -> None:
    package = Path(channels_rabbitmq.__file__).parent
    private = re.compile(r"carehare\._|from carehare|import carehare\.")
    for path in package.rglob("*.py"):
        assert not private.search(path.read_text(encoding="utf-8")), path


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
            await connection._connection.closed
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
