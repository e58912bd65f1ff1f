"""Other programs publish to the layer: kombu as a Celery task has it, and pika."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import kombu
import kombu.pools
import msgpack
import pika  # type: ignore[import-untyped]  # has no annotations
import pika.exceptions  # type: ignore[import-untyped]  # as above
import pytest

from tests.support.brokers import Broker
from tests.support.layers import statistics_of
from tests.support.log_lines import log_lines
from tests.support.members import GROUP, OpenLayer, open_member, receive, reconnect

Publish = Callable[[str, str, str, dict[str, Any]], None]

MESSAGE = {"type": "chat.message", "text": "grüße", "tags": ["a", {"b": None}], "raw": b"\x00\xff"}
GOOD = {"type": "good"}


def publish_by_kombu(url: str, exchange: str, routing_key: str, body: dict[str, Any]) -> None:
    """As a Celery task does it, with the settings it has if nobody thinks about them."""
    groups = kombu.Exchange(exchange, type="direct", durable=False, auto_delete=False)
    with kombu.Connection(url) as connection:
        connection.Producer().publish(
            body, serializer="msgpack", exchange=groups, routing_key=routing_key, declare=[groups]
        )


def publish_by_kombu_pool(url: str, exchange: str, routing_key: str, body: dict[str, Any]) -> None:
    """From the pool of producers that Celery keeps, and with confirms."""
    groups = kombu.Exchange(exchange, type="direct", durable=False, auto_delete=False)
    connection = kombu.Connection(url, transport_options={"confirm_publish": True})
    try:
        with kombu.pools.producers[connection].acquire(block=True) as producer:
            producer.publish(
                msgpack.packb(body),
                content_type="application/x-msgpack",
                content_encoding="binary",
                exchange=groups,
                routing_key=routing_key,
                declare=[groups],
                retry=True,
            )
    finally:
        kombu.pools.reset()


def publish_by_pika(url: str, exchange: str, routing_key: str, body: dict[str, Any]) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        amqp_channel = connection.channel()
        amqp_channel.exchange_declare(exchange, "direct", durable=False, auto_delete=False)
        amqp_channel.basic_publish(exchange, routing_key, msgpack.packb(body))


PROGRAMS = [publish_by_kombu, publish_by_kombu_pool, publish_by_pika]


def publish_bodies(
    url: str,
    exchange: str,
    routing_key: str,
    bodies: list[bytes],
    properties: pika.BasicProperties | None = None,
) -> None:
    """Publish as they are; each was confirmed, and had a queue, or pika raises an error."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        amqp_channel = connection.channel()
        amqp_channel.confirm_delivery()
        for body in bodies:
            amqp_channel.basic_publish(exchange, routing_key, body, properties, mandatory=True)


def to_group(message: dict[str, Any], group: str = GROUP) -> dict[str, Any]:
    return {**message, "__asgi_group__": group}


def to_channel(message: dict[str, Any], channel: str) -> dict[str, Any]:
    return {**message, "__asgi_channel__": channel}


def key_of(channel: str) -> str:
    """The routing key of a channel in the groups exchange, as the manual tells it."""
    return channel.partition("!")[0] + "!"


@pytest.mark.parametrize("publish", PROGRAMS)
class TestPublishing:
    async def test_to_a_group(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str, publish: Publish
    ) -> None:
        """All members get it, in all processes; the program may declare the exchange first."""
        await asyncio.to_thread(publish, broker.url, groups_exchange, GROUP, to_group(MESSAGE))
        members = [await open_member(open_layer) for _ in range(2)]
        for _ in range(2):
            await asyncio.to_thread(publish, broker.url, groups_exchange, GROUP, to_group(MESSAGE))
            for layer, channel in members:
                assert await receive(layer, channel) == MESSAGE
            for layer, _ in members:
                await reconnect(layer)
                await layer.group_add(GROUP, await layer.new_channel())  # bound again

    async def test_to_a_channel(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str, publish: Publish
    ) -> None:
        layer, channel = await open_member(open_layer)
        body = to_channel(MESSAGE, channel)
        for _ in range(2):
            await asyncio.to_thread(publish, broker.url, groups_exchange, key_of(channel), body)
            assert await receive(layer, channel) == MESSAGE
            await reconnect(layer)


class TestChannels:
    async def test_the_default_exchange_leads_to_a_channel_until_the_first_reconnect(
        self, open_layer: OpenLayer, broker: Broker
    ) -> None:
        """The way of channels_rabbitmq 4.x. Afterwards a mandatory message says that it ended."""
        layer, channel = await open_member(open_layer)
        queue = channel.partition("!")[0]
        bodies = [msgpack.packb(to_channel(MESSAGE, channel))]
        await asyncio.to_thread(publish_bodies, broker.url, "", queue, bodies)
        assert await receive(layer, channel) == MESSAGE
        await reconnect(layer)
        with pytest.raises(pika.exceptions.UnroutableError):
            await asyncio.to_thread(publish_bodies, broker.url, "", queue, bodies)

    async def test_a_channel_of_another_process_is_dropped_and_logged(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str
    ) -> None:
        layer, channel = await open_member(open_layer)
        with log_lines() as lines:
            bodies = [
                msgpack.packb(to_channel(MESSAGE, "crq.aaaaaaaaaaaaaaaa!specific.x")),
                msgpack.packb(to_channel(MESSAGE, "normal-channel")),
                msgpack.packb(to_channel(GOOD, channel)),
            ]
            await asyncio.to_thread(
                publish_bodies, broker.url, groups_exchange, key_of(channel), bodies
            )
            assert await receive(layer, channel) == GOOD
            assert statistics_of(layer).counters.misrouted == 2
            line = await lines.next("WARNING")
        assert "2 messages dropped: for channels of another process" in line
        assert "crq.aaaaaaaaaaaaaaaa!specific.x (1)" in line


class TestWhatOtherProgramsMaySend:
    async def test_any_amqp_properties(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str
    ) -> None:
        layer, channel = await open_member(open_layer)
        properties = pika.BasicProperties(
            content_type="application/x-msgpack",
            content_encoding="binary",
            headers={"lang": "py", "retries": 0, "origin": "worker", "long": "x" * 5000},
            delivery_mode=2,
            priority=9,
            correlation_id="c",
            reply_to="r",
            expiration="10000",
            message_id="m",
            timestamp=1,
            type="t",
            app_id="a",
        )
        bodies = [msgpack.packb(to_group(MESSAGE))]
        await asyncio.to_thread(
            publish_bodies, broker.url, groups_exchange, GROUP, bodies, properties
        )
        assert await receive(layer, channel) == MESSAGE

    async def test_a_message_of_many_frames(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str
    ) -> None:
        layer, channel = await open_member(open_layer)
        message = {"type": "large", "data": b"\xce" * 2**21}
        await asyncio.to_thread(
            publish_by_pika, broker.url, groups_exchange, GROUP, to_group(message)
        )
        assert await receive(layer, channel) == message

    async def test_keys_that_are_not_strings(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str
    ) -> None:
        """Refused from our own users, but what another program sends is its receivers' business."""
        layer, channel = await open_member(open_layer)
        message: dict[Any, Any] = {"type": "t", "counts": {1: 2}, 3: "three"}
        await asyncio.to_thread(
            publish_by_pika, broker.url, groups_exchange, GROUP, to_group(message)
        )
        assert await receive(layer, channel) == message

    async def test_the_group_in_the_body_counts_not_the_routing_key(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str
    ) -> None:
        layer, channel = await open_member(open_layer)
        bodies = [msgpack.packb(to_group(MESSAGE, "another")), msgpack.packb(to_group(GOOD))]
        await asyncio.to_thread(publish_bodies, broker.url, groups_exchange, GROUP, bodies)
        assert await receive(layer, channel) == GOOD
        assert statistics_of(layer).counters.no_members == 1

    async def test_a_full_queue_refuses_what_another_program_publishes(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str
    ) -> None:
        layer, channel = await open_member(open_layer, local_capacity=1, remote_capacity=2)
        bodies = [msgpack.packb(to_group({"n": n})) for n in range(20)]
        with pytest.raises(pika.exceptions.NackError):
            await asyncio.to_thread(publish_bodies, broker.url, groups_exchange, GROUP, bodies)
        assert [(await receive(layer, channel))["n"] for _ in range(3)] == [0, 1, 2]


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


GROUP_KEY = msgpack.packb("__asgi_group__")
PACKED_GROUP = msgpack.packb(GROUP)
PACKED_GOOD = msgpack.packb(to_group(GOOD))

# name: (the body, what is logged about it)
MALFORMED = {
    "empty": (b"", "not msgpack"),
    "text": (b"hello", "not msgpack"),
    "json": (b'{"type": "t", "__asgi_group__": "chat.room-1"}', "not msgpack"),
    "pickle": (b"\x80\x04}\x94\x8c\x04type\x94\x8c\x01t\x94s.", "not msgpack"),
    "cut short": (PACKED_GOOD[:-1], "not msgpack"),
    "something behind it": (PACKED_GOOD + b"\xc0", "not msgpack"),
    "two messages": (PACKED_GOOD * 2, "not msgpack"),
    "not utf-8": (b"\x82\xa1t\xa1\xff" + GROUP_KEY + PACKED_GROUP, "not msgpack"),
    "a key that cannot be one": (b"\x82\x90\xc0" + GROUP_KEY + PACKED_GROUP, "not msgpack"),
    "a length of 4 GiB": (b"\xdf" + b"\xff" * 4 + PACKED_GOOD[1:], "not msgpack"),
    "a string of 4 GiB": (b"\x81" + GROUP_KEY + b"\xdb" + b"\xff" * 4, "not msgpack"),
    "nested too deep": (
        b"\x82\xa1t" + nested(100_000) + GROUP_KEY + PACKED_GROUP,
        "not msgpack",
    ),
    "the byte that msgpack never uses": (b"\xc1", "not msgpack"),
    "an array": (msgpack.packb([to_group(GOOD)]), "not a map"),
    "a string": (msgpack.packb(GROUP), "not a map"),
    "nil": (b"\xc0", "not a map"),
    "no recipient": (msgpack.packb(GOOD), "no recipient"),
    "an empty map": (b"\x80", "no recipient"),
    "two recipients": (msgpack.packb(to_channel(to_group(GOOD), "x!y")), "two recipients"),
    "recipient is a number": (msgpack.packb(to_group(GOOD, 7)), "a recipient that"),  # type: ignore[arg-type]  # the fault
    "recipient is bytes": (msgpack.packb(to_group(GOOD, b"g")), "a recipient that"),  # type: ignore[arg-type]  # the fault
    "recipient is nil": (msgpack.packb({"__asgi_channel__": None}), "a recipient that"),
    "recipient is empty": (msgpack.packb(to_group(GOOD, "")), "a recipient that"),
    "the group twice": (
        b"\x82" + (GROUP_KEY + PACKED_GROUP) * 2,
        "a key comes twice",
    ),
    "a timestamp": (
        msgpack.packb(to_group({"at": msgpack.Timestamp(1, 2)})),
        "a msgpack extension type",
    ),
    "an extension": (
        msgpack.packb(to_group({"x": msgpack.ExtType(5, b"data")})),
        "a msgpack extension type",
    ),
    "encrypted": (
        msgpack.packb(to_group({"__asgi_encrypted__": b"token"})),
        "encrypted, but no symmetric_encryption_keys",
    ),
}


class TestMalformed:
    """None of them disturbs the next good message, on which everything else depends."""

    @pytest.mark.parametrize(
        ("body", "reason"), [pytest.param(*case, id=name) for name, case in MALFORMED.items()]
    )
    async def test_it_is_counted_and_logged_and_the_next_message_arrives(
        self,
        open_layer: OpenLayer,
        broker: Broker,
        groups_exchange: str,
        body: bytes,
        reason: str,
    ) -> None:
        layer, channel = await open_member(open_layer)
        with log_lines() as lines:
            await asyncio.to_thread(
                publish_bodies, broker.url, groups_exchange, GROUP, [body, PACKED_GOOD]
            )
            assert await receive(layer, channel) == GOOD
            line = await lines.next("WARNING")
            assert lines.rest() == []
        assert "1 message dropped: not in this layer's format: " + reason in line
        assert "Traceback" not in line
        assert statistics_of(layer).counters.malformed == 1

    @pytest.mark.parametrize(
        "options", [{"serializer": "json"}, {"serializer": "msgpack", "compression": "zlib"}]
    )
    async def test_kombu_with_other_settings(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str, options: dict[str, str]
    ) -> None:
        """What somebody does who forgets the serializer, or has compression switched on."""
        layer, channel = await open_member(open_layer)

        def publish() -> None:
            with kombu.Connection(broker.url) as connection:
                connection.Producer().publish(
                    to_group(GOOD), exchange=groups_exchange, routing_key=GROUP, **options
                )

        with log_lines() as lines:
            await asyncio.to_thread(publish)
            assert "not msgpack (1)" in await lines.next("WARNING")
        await layer.group_send(GROUP, GOOD)
        assert await receive(layer, channel) == GOOD

    async def test_more_of_them_than_fit_into_memory(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str
    ) -> None:
        """Each is acked at once, so they can't use up ``local_capacity``; one line tells of all."""
        # On a busy machine the publisher may be far ahead.
        layer, channel = await open_member(open_layer, local_capacity=3, remote_capacity=1000)
        bodies = [b"s3cret %d" % n for n in range(300)]
        with log_lines() as lines:
            await asyncio.to_thread(
                publish_bodies, broker.url, groups_exchange, GROUP, [*bodies, PACKED_GOOD]
            )
            assert await receive(layer, channel) == GOOD
            assert statistics_of(layer).counters.malformed == 300
            await layer.close()
            logged = [line for line in lines.rest() if "WARNING" in line]
        assert 1 <= len(logged) <= 2
        assert not [line for line in logged if "s3cret" in line]


async def test_a_time_of_publishing_that_cannot_be_is_left_out(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str
) -> None:
    """Other programs may write that header, and machines' clocks differ."""
    layer, channel = await open_member(open_layer, expiry=10)
    await layer.connect()
    body = msgpack.packb(to_channel(MESSAGE, channel))

    async def publish(published: int) -> None:
        properties = pika.BasicProperties(headers={"timestamp_in_ms": published})
        where = (broker.url, groups_exchange, key_of(channel))
        await asyncio.to_thread(publish_bodies, *where, [body], properties)
        assert await receive(layer, channel) == MESSAGE

    for published in (-(2**62), 0, int((time.time() - 3600) * 1000), 2**62):
        await publish(published)
    assert layer.statistics()[0].highest_age < 5
    await publish(int((time.time() - 7) * 1000))
    assert 7 <= layer.statistics()[0].highest_age < 12
