"""AMQP channels on a broker."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import carehare
import pytest
from pamqp import commands

from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.consuming import ConsumerChannel
from channels_rabbitmq._amqp.frames import encode_ack
from channels_rabbitmq._amqp.publishing import Outcome, PublisherChannel, Route
from channels_rabbitmq._amqp.url import BrokerUrl
from tests.support.brokers import Broker
from tests.support.deadlines import soon

CONFIRMED, REFUSED, RETURNED, UNKNOWN = (
    Outcome.CONFIRMED,
    Outcome.NACKED,
    Outcome.RETURNED,
    Outcome.UNKNOWN,
)


def exception_of(future: asyncio.Future[Any]) -> BaseException | None:
    assert future.done()
    return future.exception()


@pytest.fixture
async def connection(broker: Broker) -> AsyncIterator[Connection]:
    connection = Connection(BrokerUrl.parse(broker.url), connection_name="test")
    await connection.connect()
    yield connection
    await connection.close()


async def declare(connection: Connection, queue: str, **arguments: Any) -> None:
    done = connection.open_topology().call(
        commands.Queue.Declare(queue=queue, exclusive=True, arguments=arguments)
    )
    await done


async def test_broker_refuses_one_bind_amid_good_ones(connection: Connection, queue: str) -> None:
    await declare(connection, queue)
    topology = connection.open_topology()
    answers = [
        topology.call(
            commands.Queue.Bind(
                queue=queue,
                exchange=f"missing-{queue}" if n in (3, 4, 9) else "amq.direct",
                routing_key=f"{queue} {n}",
            )
        )
        for n in range(12)
    ]
    await asyncio.wait(answers)
    refused = [n for n, answer in enumerate(answers) if answer.exception() is not None]
    assert refused == [3, 4, 9]
    assert all(exception_of(answers[n]).reply_code == 404 for n in refused)  # type: ignore[union-attr]  # it is there

    # The others are bound: a message for each arrives.
    got: asyncio.Queue[bytes] = asyncio.Queue()
    consumer = connection.open_consumer(
        on_delivery=lambda body, tag, published, consumer: got.put_nowait(body),
        on_end=lambda exc: None,
    )
    await consumer.consume(queue, 100)
    publisher = connection.open_publisher(on_end=lambda exc: None)
    told = [
        await publisher.publish(
            b"%d" % n, Route("amq.direct", f"{queue} {n}", mandatory=True), soon()
        )
        for n in range(12)
    ]
    assert [n for n in range(12) if told[n] is RETURNED] == refused
    assert [int(await got.get()) for _ in range(9)] == [n for n in range(12) if n not in refused]


class RealConsumer:
    """A queue of a real broker's, and what is consumed from it."""

    def __init__(self, connection: Connection, queue: str) -> None:
        self.connection = connection
        self.queue = queue
        self.got: asyncio.Queue[tuple[bytes, int]] = asyncio.Queue()
        self.ended: asyncio.Queue[Exception] = asyncio.Queue()
        self.channel: ConsumerChannel = connection.open_consumer(
            on_delivery=lambda body, tag, published, consumer: self.got.put_nowait((body, tag)),
            on_end=self.ended.put_nowait,
        )
        self.publisher: PublisherChannel = connection.open_publisher(on_end=self.ended.put_nowait)

    async def start(self, prefetch_count: int = 10) -> None:
        await declare(self.connection, self.queue)
        await self.channel.consume(self.queue, prefetch_count)

    async def publish(self, *bodies: bytes) -> list[Outcome]:
        futures = [
            self.publisher.publish(body, Route("", self.queue, mandatory=True), soon())
            for body in bodies
        ]
        return list(await asyncio.gather(*futures))


async def test_deleted_queue_ends_its_consumer(connection: Connection, queue: str) -> None:
    consumer = RealConsumer(connection, queue)
    await consumer.start()
    await connection.open_topology().call(commands.Queue.Delete(queue=queue))
    exc = await consumer.ended.get()
    assert isinstance(exc, carehare.ChannelClosed)
    assert connection.is_open
    assert await consumer.publish(b"nowhere") == [RETURNED]


async def test_acks_in_any_order_do_not_upset_the_broker(
    connection: Connection, queue: str
) -> None:
    """It closes the channel (406) over a tag that isn't outstanding."""
    consumer = RealConsumer(connection, queue)
    await consumer.start(prefetch_count=20)
    total = 200
    told = asyncio.create_task(consumer.publish(*(b"%d" % n for n in range(total))))
    held: list[int] = []
    for step in range(total):
        held.append((await consumer.got.get())[1])
        # Ack from the middle, in bursts; all 20 that may be unacked are held now and then.
        if len(held) == 20 or step % 7 == 0:
            while len(held) > step % 11:
                consumer.channel.ack(held.pop(len(held) // 2))
    assert await told == [CONFIRMED] * total
    for tag in held:
        consumer.channel.ack(tag)
    # The broker's word on these acks comes before that on the next call.
    await consumer.channel.call(commands.Basic.Qos(prefetch_count=1))
    assert consumer.ended.empty()
    assert await consumer.publish(b"one more") == [CONFIRMED]
    assert (await consumer.got.get())[0] == b"one more"


async def test_wrong_ack_ends_the_consumer_and_no_other(connection: Connection, queue: str) -> None:
    consumer = RealConsumer(connection, queue)
    await consumer.start()
    number = consumer.channel._amqp_channel_id
    connection.protocol.write(encode_ack(number, 9999, False))
    exc = await consumer.ended.get()
    assert isinstance(exc, carehare.ChannelClosedByServer)
    assert exc.reply_code == 406
    assert await consumer.publish(b"x") == [CONFIRMED]


async def test_real_outcomes(connection: Connection, queue: str) -> None:
    """A full queue refuses, an unknown key is returned, and each message has its own answer."""
    await declare(connection, queue, **{"x-max-length": 3, "x-overflow": "reject-publish"})
    publisher = connection.open_publisher(on_end=lambda exc: None)
    keys = [queue, "nobody", queue, "nobody", queue, queue, "nobody", queue]
    futures = [
        publisher.publish(b"body", Route("", key, mandatory=key == "nobody"), soon())
        for key in keys
    ]
    told = await asyncio.gather(*futures)
    assert [told[n] for n in (1, 3, 6)] == [RETURNED] * 3
    assert [told[n] for n in (0, 2, 4, 5, 7)] == [CONFIRMED] * 3 + [REFUSED] * 2


async def test_missing_exchange_ends_the_publisher(connection: Connection) -> None:
    ended: list[Exception] = []
    publisher = connection.open_publisher(on_end=ended.append)
    outcome = await publisher.publish(b"x", Route("missing-exchange", "k", mandatory=False), soon())
    assert outcome is UNKNOWN
    assert isinstance(ended[0], carehare.ChannelClosedByServer)
    assert connection.is_open


@pytest.mark.parametrize("size", [0, 131063, 131064, 131065, 131072, 300_000])
async def test_bodies_of_any_size_arrive(connection: Connection, queue: str, size: int) -> None:
    consumer = RealConsumer(connection, queue)
    await consumer.start()
    body = secrets.token_bytes(size)
    assert await consumer.publish(body) == [CONFIRMED]
    assert (await consumer.got.get())[0] == body
