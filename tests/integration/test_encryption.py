"""``symmetric_encryption_keys`` between layers, through a real broker."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pytest
from cryptography.fernet import Fernet

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.layers import statistics_of
from tests.support.log_lines import LogLines, log_lines

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]
Keys = list[str | bytes]

GROUP = "g"
SECRET: dict[str, Any] = {"type": "secret", "text": "Geheimnis", "data": b"\x00\xff" * 100}
END = {"type": "end"}
OLD_KEY = "the 0ld key"
NEW_KEY = "the n3w key"
# What all processes have, one step after the other, to go from one key to another.
ROTATION: list[Keys] = [[OLD_KEY], [OLD_KEY, NEW_KEY], [NEW_KEY, OLD_KEY], [NEW_KEY]]


class Member:
    """A layer with one channel, which is in the group."""

    def __init__(self, layer: RabbitmqChannelLayer, channel: str) -> None:
        self.layer = layer
        self.channel = channel

    @property
    def malformed(self) -> int:
        return statistics_of(self.layer).counters.malformed

    async def receive(self) -> dict[str, Any]:
        """Receive, with a limit so that a lost message fails here and not at the test's limit."""
        return await asyncio.wait_for(self.layer.receive(self.channel), 10)


async def open_member(open_layer: OpenLayer, keys: Keys | None = None) -> Member:
    layer = await open_layer(symmetric_encryption_keys=keys)
    channel = await layer.new_channel()
    await layer.group_add(GROUP, channel)
    return Member(layer, channel)


async def must_understand(sender: Member, receiver: Member) -> None:
    await sender.layer.group_send(GROUP, SECRET)
    assert await sender.receive() == SECRET
    assert await receiver.receive() == SECRET
    await sender.layer.send(receiver.channel, SECRET)
    assert await receiver.receive() == SECRET
    assert sender.malformed == receiver.malformed == 0


async def must_not_understand(sender: Member, receiver: Member, lines: LogLines, why: str) -> None:
    """What it can't read is counted and logged, and its next message arrives all the same."""
    before = receiver.malformed
    await sender.layer.group_send(GROUP, SECRET)
    assert await sender.receive() == SECRET
    await sender.layer.send(receiver.channel, SECRET)
    await receiver.layer.send(receiver.channel, END)
    assert await receiver.receive() == END
    assert receiver.malformed == before + 2
    line = await lines.next(f"WARNING {receiver.channel.partition('!')[0]}: .* messages dropped")
    assert f"2 messages dropped: not in this layer's format: {why} (2)" in line
    for secret in (OLD_KEY, NEW_KEY, SECRET["text"]):
        assert secret not in line


async def test_between_layers_with_the_same_key(open_layer: OpenLayer) -> None:
    a = await open_member(open_layer, [OLD_KEY])
    b = await open_member(open_layer, [OLD_KEY.encode()])
    for sender, receiver in ((a, b), (b, a)):
        await must_understand(sender, receiver)


async def test_large_messages(open_layer: OpenLayer) -> None:
    member = await open_member(open_layer, [OLD_KEY])
    message = {"data": bytes(range(256)) * 2**12}
    await member.layer.group_send(GROUP, message)
    assert await member.receive() == message


async def test_a_layer_without_keys(open_layer: OpenLayer) -> None:
    """Neither understands the other; two that have the key aren't disturbed."""
    a = await open_member(open_layer, [OLD_KEY])
    b = await open_member(open_layer, [OLD_KEY])
    without = await open_member(open_layer)
    with log_lines() as lines:
        await must_not_understand(
            a, without, lines, "encrypted, but no symmetric_encryption_keys are set"
        )
        assert await b.receive() == SECRET
    with log_lines() as lines:
        await must_not_understand(
            without, a, lines, "not encrypted, but symmetric_encryption_keys are set"
        )
    await b.layer.send(a.channel, SECRET)
    assert await a.receive() == SECRET


async def test_another_key(open_layer: OpenLayer) -> None:
    a = await open_member(open_layer, [OLD_KEY])
    b = await open_member(open_layer, [NEW_KEY])
    why = "encrypted with a key that symmetric_encryption_keys lacks"
    for sender, receiver in ((a, b), (b, a)):
        with log_lines() as lines:
            await must_not_understand(sender, receiver, lines, why)


@pytest.mark.parametrize(("before", "after"), list(itertools.pairwise(ROTATION)))
async def test_a_step_of_the_rotation(open_layer: OpenLayer, before: Keys, after: Keys) -> None:
    """While some processes have made the step and others haven't, all understand each other."""
    a = await open_member(open_layer, before)
    b = await open_member(open_layer, after)
    await must_understand(a, b)
    await must_understand(b, a)


async def test_a_step_left_out(open_layer: OpenLayer) -> None:
    """Why the rotation has that many steps."""
    a = await open_member(open_layer, ROTATION[0])
    b = await open_member(open_layer, ROTATION[2])
    await must_understand(a, b)
    with log_lines() as lines:
        why = "encrypted with a key that symmetric_encryption_keys lacks"
        await must_not_understand(b, a, lines, why)


class TestOnTheWire:
    async def test_the_recipient_is_readable_the_message_is_not(
        self, open_layer: OpenLayer, groups_exchange: str
    ) -> None:
        member = await open_member(open_layer, [OLD_KEY])
        connection = await member.layer.carehare_connection
        queue = f"tap-{groups_exchange}"
        await connection.queue_declare(queue, exclusive=True)
        await connection.queue_bind(queue, groups_exchange, routing_key=GROUP)
        await member.layer.group_send(GROUP, SECRET)
        async with connection.acking_consumer(queue) as consumer:
            body, _ = await asyncio.wait_for(consumer.next_delivery(), 10)
        assert b"Geheimnis" not in body
        assert b"secret" not in body
        content = msgpack.unpackb(body)
        assert content.keys() == {"__asgi_group__", "__asgi_encrypted__"}
        assert content["__asgi_group__"] == GROUP

    async def test_another_program_that_has_the_key(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str
    ) -> None:
        """The whole of what it needs to know: a Fernet token, its key is the SHA-256 of ours."""
        member = await open_member(open_layer, [OLD_KEY])
        fernet = Fernet(base64.urlsafe_b64encode(hashlib.sha256(OLD_KEY.encode()).digest()))
        token = fernet.encrypt(msgpack.packb(SECRET))
        body = msgpack.packb({"__asgi_group__": GROUP, "__asgi_encrypted__": token})
        connection = await member.layer.carehare_connection
        for damaged in (body, body[:-5] + b"AAAAA", body):
            await connection.publish(damaged, exchange_name=groups_exchange, routing_key=GROUP)
        assert await member.receive() == SECRET
        assert await member.receive() == SECRET
        assert member.malformed == 1
