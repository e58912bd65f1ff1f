"""Whatever bytes come, the layer lives: bodies that others publish, and frames of the broker's."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgpack
import pamqp.commands as commands
import pika  # type: ignore[import-untyped]  # has no annotations
import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq._broker import back_off as _back_off
from channels_rabbitmq._codec import MessageCodec
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import TO_CLIENT, AmqpProxy, Frame
from tests.support.brokers import Broker
from tests.support.layers import inside, statistics_of, subscriber_of
from tests.support.lengths import Length
from tests.support.log_lines import LogLines
from tests.support.patience import connect_patiently

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

_BODIES = Length(full=100_000, brief=8_000)
_DAMAGES = Length(full=500, brief=12)  # each of one frame, on the way of a real connection

_KEY = "a key"  # symmetric

logger = logging.getLogger(__name__)  # of figures: pytest -o log_cli=1 --log-cli-level=INFO


class Mutator:
    """Damages bytes, each time in another way."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def mutate(self, data: bytes) -> bytes:
        for _ in range(self.chance.randrange(1, 4)):
            data = self._mutate_once(bytearray(data))
        return data

    def _mutate_once(self, data: bytearray) -> bytes:
        at = self.chance.randrange(len(data) + 1)
        length = self.chance.choice([1, 1, 1, 2, 4, 8, 40])
        how = self.chance.randrange(7)
        if how == 0 and at < len(data):
            data[at] ^= 1 << self.chance.randrange(8)
        elif how == 1 and at < len(data):
            data[at] = self.chance.choice([0, 1, 0x7F, 0x80, 0xC1, 0xFE, 0xFF])
        elif how == 2:
            data[at:at] = self.chance.randbytes(length)
        elif how == 3:
            del data[at : at + length]
        elif how == 4:
            del data[at:]
        elif how == 5:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = self.chance.randbytes(length)
        return bytes(data)


# Bodies


class Bodies:
    """Hostile ones, from good ones of all kinds, or from nothing."""

    def __init__(self, chance: random.Random, group: str, channel: str) -> None:
        self.chance = chance
        self._mutator = Mutator(chance)
        id_ = channel.partition("!")[0]
        message = {"type": "x", "n": [1, -2, 2**40, 0.5, None, True], "d": {"a": b"\0" * 20}}
        plain = MessageCodec(max_message_size=10**6)
        secret = MessageCodec(max_message_size=10**6, symmetric_encryption_keys=[_KEY])
        self._good = [
            encode(name, message)
            for codec in (plain, secret)
            for encode, name in (
                (codec.encode_for_group, group),
                (codec.encode_for_group, "another"),
                (codec.encode_for_channel, channel),
                (codec.encode_for_channel, f"{id_}!"),  # as the probe's
                (codec.encode_for_channel, f"{id_}!unknown"),
                (codec.encode_for_channel, "channels_AbCdEfGhIjKl!x"),
            )
        ]
        self._good += [
            msgpack.packb({"__asgi_group__": group, "at": msgpack.Timestamp(1, 2)}),
            msgpack.packb({"__asgi_group__": [group], "__asgi_channel__": channel}),
            msgpack.packb({"__asgi_group__": group, 1: {2: 3}}, strict_types=True),
            b"\x81\xae__asgi_group__\xdb\xff\xff\xff\xff",
            b"\x91" * 2000 + b"\xc0",
            b"{}",
        ]

    def next(self) -> bytes:
        if self.chance.random() < 0.1:
            return self.chance.randbytes(self.chance.choice([0, 1, 2, 10, 100, 5000]))
        return self._mutator.mutate(self.chance.choice(self._good))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [None, [_KEY]], ids=["plain", "encrypted"])
async def test_bodies_on_the_exchange_and_on_the_queue(
    open_layer: OpenLayer,
    broker: Broker,
    groups_exchange: str,
    lines_without_errors: LogLines,
    keys: list[str] | None,
) -> None:
    layer = await open_layer(
        symmetric_encryption_keys=keys,
        remote_capacity=None,  # all of them are to arrive
        # Damaged names are those of channels that nobody reads: they may fill what they can.
        local_expiry=1.0,
    )
    channel, lure = await layer.new_channel(), await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.group_add("g", lure)
    await layer.connect()
    subscriber = subscriber_of(layer)
    connection = subscriber.supervisor.connection
    bodies = Bodies(random.Random(8), "g", lure)
    codec = MessageCodec(max_message_size=10**6, symmetric_encryption_keys=keys or ())
    count = _BODIES.count // 2  # for each of the two layers
    good = 0

    def publish() -> None:
        nonlocal good
        with pika.BlockingConnection(pika.URLParameters(broker.url)) as publisher:
            amqp_channel = publisher.channel()
            for number in range(count):
                to_queue = bodies.chance.random() < 0.5
                exchange, key = ("", subscriber.queue) if to_queue else (groups_exchange, "g")
                amqp_channel.basic_publish(exchange, key, bodies.next())
                if number % 500 == 499:
                    message = {"good": good}
                    body = codec.encode_for_channel(channel, message)
                    amqp_channel.basic_publish(exchange, key, body)
                    good += 1

    heard: list[int] = []

    async def hear() -> None:
        while True:
            message = await layer.receive(channel)
            if "good" in message:
                heard.append(message["good"])

    async def empty(channel: str) -> None:
        while True:
            await layer.receive(channel)

    tasks = [asyncio.create_task(hear()), asyncio.create_task(empty(lure))]
    publishing = asyncio.create_task(asyncio.to_thread(publish))
    deadline = asyncio.get_running_loop().time() + 40 + count / 200
    while not publishing.done() or statistics_of(layer).counters.delivered < count + good:
        assert asyncio.get_running_loop().time() < deadline, repr(inside(layer))
        await asyncio.sleep(0.02)
    publishing.result()
    # The next good message
    await layer.send(channel, {"good": -1})
    while heard[-1:] != [-1]:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)
    assert heard == [*range(good), -1]
    counters = statistics_of(layer).counters
    assert counters.delivered == count + good + 1
    logger.info("%s", counters)
    assert counters.malformed > count // 4
    assert counters.no_members > 0
    assert subscriber.supervisor.connection is connection, "it was lost"
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        assert task.cancelled()
    # What they left in channels that nobody reads goes in its time.
    while statistics_of(layer).buffered:
        assert asyncio.get_running_loop().time() < deadline + 20
        await asyncio.sleep(0.02)


# Frames, in memory


# Frames, on the way of real connections


class Damage:
    """Damages one frame towards the client, of whatever kind comes at a random moment."""

    KINDS = ("mutate", "truncate", "insert frame", "insert bytes", "drop", "repeat")

    def __init__(self, proxy: AmqpProxy, chance: random.Random) -> None:
        self.proxy = proxy
        self.chance = chance
        self.mutator = Mutator(chance)
        self.done = asyncio.Event()
        self._how = chance.choice(self.KINDS)
        # Also in the midst of a handshake or a set-up
        self._left = chance.randrange(30)
        self._rule = proxy.rule(TO_CLIENT, object, self._handle)

    def _handle(self, frame: Frame) -> Any:
        if self.done.is_set():
            return frame
        if self._left:
            self._left -= 1
            return frame
        self.done.set()
        if self._how == "mutate":
            return self.mutator.mutate(frame.raw)
        if self._how == "truncate":
            asyncio.get_running_loop().call_soon(partial(frame.link.cut, reset=False))
            return frame.raw[: self.chance.randrange(len(frame.raw))]
        if self._how == "insert frame":
            index = self.chance.choice(sorted(commands.INDEX_MAPPING))
            payload = index.to_bytes(4, "big") + self.chance.randbytes(self.chance.randrange(20))
            channel = self.chance.randrange(4).to_bytes(2, "big")
            size = len(payload).to_bytes(4, "big")
            return [frame, b"\x01" + channel + size + payload + b"\xce"]
        if self._how == "insert bytes":
            return [self.chance.randbytes(self.chance.randrange(1, 100)), frame]
        return [] if self._how == "drop" else [frame, frame]

    def end(self) -> None:
        self.proxy.remove(self._rule)


@pytest.mark.slow
async def test_damaged_frames_on_the_way_of_real_connections(
    open_layer: OpenLayer,
    proxy: AmqpProxy,
    lines_without_errors: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some damage shows at once; some only in that nothing arrives, which the probe finds."""
    # One loss so soon after the other would make the back-off long.
    monkeypatch.setattr(_back_off, "LONGEST_DELAY", 0.2)
    url = proxy.url + "?heartbeat=1"
    layer = await open_layer(
        host=url, operation_timeout=1, connect_timeout=1, watchdog_interval=0.2
    )
    channel = await layer.new_channel()
    await connect_patiently(layer)
    numbers = itertools.count()
    received: list[int] = []

    async def hear() -> None:
        while True:
            message = await layer.receive(channel)
            if "number" in message:  # The damage may have been to a body.
                received.append(message["number"])

    async def offer() -> None:
        """Send, join and leave, so that there are frames of all kinds."""
        number = next(numbers)
        with contextlib.suppress(BrokerUnavailable, ChannelFull):
            await layer.send(channel, {"number": number})
        with contextlib.suppress(BrokerUnavailable, ChannelFull):
            await layer.group_add(f"g{number}", channel)
            await layer.group_send(f"g{number}", {"number": next(numbers)})
        await layer.group_discard(f"g{number}", channel)

    async def must_deliver() -> None:
        deadline = asyncio.get_running_loop().time() + 30
        begun = next(numbers)
        while not received or received[-1] < begun:
            assert asyncio.get_running_loop().time() < deadline, (
                f"dead: {lines_without_errors.rest()[-10:]}"
            )
            await offer()
            await asyncio.sleep(0.01)

    hearing = asyncio.create_task(hear())
    chance = random.Random(9)
    await must_deliver()
    for _ in range(_DAMAGES.count):
        damage = Damage(proxy, chance)
        if chance.random() < 0.2:
            proxy.cut()  # so that it hits a handshake or a set-up
        while not damage.done.is_set():
            await offer()
        await must_deliver()
        damage.end()
    logger.info("%d links, %d messages", proxy.opened, len(received))
    assert proxy.opened > 2
    assert not hearing.done()
    hearing.cancel()
    await asyncio.wait([hearing])
