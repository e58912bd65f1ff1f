"""The channel layer specification, clause by clause, on a real broker."""

from __future__ import annotations

import asyncio
import contextvars
import math
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import carehare
import msgpack
import pytest
import uvloop
from channels.exceptions import (
    ChannelFull,
    MessageTooLarge,
    StopConsumer,
)

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.brokers import Broker
from tests.support.cancelling import receive_cancelling
from tests.support.changes import until
from tests.support.fake_servers import silent_server
from tests.support.layers import (
    has_members,
    inside,
    loop_layers_of,
    publisher_of,
    set_linger,
    set_retry_timeout,
    statistics_of,
)
from tests.support.log_lines import log_lines
from tests.support.programs import without_slowness
from tools.private_broker import free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}
END = {"type": "end"}


async def receive(layer: RabbitmqChannelLayer, channel: str) -> dict[str, Any]:
    """Receive, with a limit so that a lost message fails here and not at the test's limit."""
    return await asyncio.wait_for(layer.receive(channel), 10)


async def receive_until_end(layer: RabbitmqChannelLayer, channel: str) -> list[dict[str, Any]]:
    messages = []
    while (message := await receive(layer, channel)) != END:
        messages.append(message)
    return messages


class TestMessages:
    async def test_every_allowed_type_arrives(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        message = {
            "type": "t",
            "bytes": b"\x00\xff",
            "str": "grüße \U0001f407",
            "int": [0, -1, 2**63 - 1, -(2**63)],
            "float": [0.5, -1e300],
            "bool": [True, False],
            "none": None,
            "tuple": (1, (2,)),
            "dict": {"a": {"b": [{}]}},
        }
        await layer.send(channel, message)
        expected = {**message, "tuple": [1, [2]]}
        assert await receive(layer, channel) == expected
        await layer.send(channel, {"nan": math.nan})
        assert math.isnan((await receive(layer, channel))["nan"])

    async def test_what_cannot_be_sent_fails_at_the_sender_and_harms_nobody(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        for bad in ({"counts": {1: 2}}, {"when": object()}, {"big": 2**64}):
            with pytest.raises(TypeError, match="message"):
                await layer.send(channel, bad)
            with pytest.raises(TypeError, match="message"):
                await layer.group_send("g", bad)
        await layer.send(channel, END)
        assert await receive_until_end(layer, channel) == []

    async def test_large_messages(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        # Around the size of a frame, and beyond the megabyte that the specification demands.
        for size in (131000, 131050, 131064, 131072, 262144, 2**20, 3 * 2**20):
            await layer.send(channel, {"body": b"x" * size})
            assert await receive(layer, channel) == {"body": b"x" * size}

    async def test_the_largest_message_of_the_defaults_passes_the_broker(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        overhead = len(msgpack.packb({"body": b"x" * 2**16, "__asgi_channel__": channel})) - 2**16
        largest = 16 * 2**20 - overhead
        await layer.send(channel, {"body": b"x" * largest})
        assert len((await receive(layer, channel))["body"]) == largest
        with pytest.raises(MessageTooLarge):
            await layer.send(channel, {"body": b"x" * (largest + 1)})

    async def test_too_large_a_message_is_refused_before_anything_is_sent(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer(max_message_size=1000)
        channel = await layer.new_channel()
        with pytest.raises(MessageTooLarge, match="1000"):
            await layer.send(channel, {"body": b"x" * 1000})
        with pytest.raises(MessageTooLarge, match="1000"):
            await layer.group_send("g", {"body": b"x" * 1000})
        assert statistics_of(layer).publisher.state == "idle"


class TestChannels:
    async def test_names_are_valid_unique_and_of_their_process(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        names = [await layer.new_channel() for _ in range(100)]
        names += [await layer.new_channel("my-prefix"), await layer.new_channel("x" * 99)]
        assert len(set(names)) == len(names)
        assert all(len(name) < 100 for name in names)
        assert {name.partition("!")[0] for name in names} == {statistics_of(layer).id}
        assert re.fullmatch(r"crq\.[a-z2-7]{16}", statistics_of(layer).id)
        assert "!my-prefix" in names[-2]

    async def test_names_do_not_come_from_the_generator_that_users_seed(
        self, open_layer: OpenLayer
    ) -> None:
        ids = set()
        for _ in range(2):
            random.seed(1)
            ids.add((await (await open_layer()).new_channel()).partition("!")[0])
        assert len(ids) == 2

    async def test_between_layers(self, open_layer: OpenLayer) -> None:
        sender, receiver = await open_layer(), await open_layer()
        channel = await receiver.new_channel()
        await sender.send(channel, MESSAGE)
        assert await receive(receiver, channel) == MESSAGE

    async def test_a_process_that_only_receives_connects_too(self, open_layer: OpenLayer) -> None:
        sender, receiver = await open_layer(), await open_layer()
        channel = await receiver.new_channel()
        receiving = asyncio.create_task(receive(receiver, channel))
        await sender.send(channel, MESSAGE)
        assert await receiving == MESSAGE
        # It greets the other processes.
        await until(lambda: statistics_of(receiver).publisher.state == "connected")

    async def test_a_process_that_only_sends_opens_no_queue(self, open_layer: OpenLayer) -> None:
        sender = await open_layer()
        await sender.group_send("g", MESSAGE)
        assert statistics_of(sender).subscriber.state == "idle"

    async def test_one_senders_messages_keep_their_order_sends_and_group_sends_alike(
        self, open_layer: OpenLayer
    ) -> None:
        # On a busy machine the sender may be far ahead.
        sender, receiver = await open_layer(), await open_layer(remote_capacity=1000)
        channel = await receiver.new_channel()
        await receiver.group_add("g", channel)

        async def send_all() -> None:
            for n in range(500):
                await sender.send(channel, {"n": 2 * n})
                await sender.group_send("g", {"n": 2 * n + 1})

        async def receive_all() -> list[int]:
            return [(await receive(receiver, channel))["n"] for _ in range(1000)]

        _, received = await asyncio.gather(send_all(), receive_all())
        assert received == list(range(1000))

    async def test_several_waiters_on_a_channel_get_one_message_each(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        receiving = [asyncio.create_task(receive(layer, channel)) for _ in range(10)]
        for n in range(10):
            await layer.send(channel, {"n": n})
        assert sorted([(await r)["n"] for r in receiving]) == list(range(10))

    async def test_a_cancelled_receive_loses_nothing(self, open_layer: OpenLayer) -> None:
        layer = await open_layer(local_capacity=1000, remote_capacity=1000)
        channel = await layer.new_channel()
        count = 500

        async def send_all() -> None:
            for n in range(count):
                await layer.send(channel, {"n": n})

        sending = asyncio.create_task(send_all())
        received = await receive_cancelling(layer, channel, count, turns=4)
        assert received == list(range(count))
        await sending

    async def test_cancelled_sends_leave_the_connection_up_and_others_unharmed(
        self, open_layer: OpenLayer
    ) -> None:
        sender = await open_layer()
        receiver = await open_layer(local_capacity=5000, remote_capacity=5000)
        cancelled_channel, channel = await receiver.new_channel(), await receiver.new_channel()
        await sender.send(channel, {"n": -1})
        connection = publisher_of(sender).supervisor.connection
        chance = random.Random(2)

        async def send_and_cancel() -> None:
            sending = asyncio.create_task(sender.send(cancelled_channel, MESSAGE))
            for _ in range(chance.randrange(5)):
                await asyncio.sleep(0)  # so that it is cancelled at different stages
            sending.cancel()
            await asyncio.wait([sending])

        async def send_all() -> None:
            for n in range(1000):
                await sender.send(channel, {"n": n})

        sending = asyncio.create_task(send_all())
        for _ in range(100):
            await asyncio.gather(*(send_and_cancel() for _ in range(10)))
        await sending
        received = [(await receive(receiver, channel))["n"] for _ in range(1001)]
        assert received == list(range(-1, 1000))
        assert publisher_of(sender).supervisor.connection is connection

    async def test_a_full_queue_is_channel_full_and_what_was_taken_arrives(
        self, open_layer: OpenLayer
    ) -> None:
        receiver = await open_layer(local_capacity=2, remote_capacity=3)
        sender = await open_layer()
        channel = await receiver.new_channel()
        taken: list[int] = []

        async def fill() -> None:
            while True:
                await sender.send(channel, {"n": len(taken)})
                taken.append(len(taken))

        with pytest.raises(ChannelFull, match="is full"):
            await fill()
        # What is on its way to the receiver counts with neither capacity for a moment.
        assert 5 <= len(taken) < 20
        received = [(await receive(receiver, channel))["n"] for _ in taken]
        assert received == taken
        await sender.send(channel, END)
        assert await receive_until_end(receiver, channel) == []

    async def test_a_queue_is_full_by_bytes_too(self, open_layer: OpenLayer) -> None:
        receiver = await open_layer(
            local_capacity=1, remote_capacity_bytes=100_000, max_message_size=100_000
        )
        sender = await open_layer()
        channel = await receiver.new_channel()
        await receiver.connect()
        message = {"type": "x", "body": b"x" * 30_000}

        async def fill() -> None:
            for _ in range(20):
                await sender.send(channel, message)

        with pytest.raises(ChannelFull, match="is full"):
            await fill()
        assert await receive(receiver, channel) == message

    async def test_a_message_as_large_as_the_queue_may_be_arrives(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer(remote_capacity_bytes=100_000, max_message_size=100_000)
        channel = await layer.new_channel()
        message = {"type": "x", "body": b"x" * 99_850}
        await layer.send(channel, message)
        assert await receive(layer, channel) == message

    async def test_the_defaults_hold_ten_thousand_messages(self, open_layer: OpenLayer) -> None:
        sender, receiver = await open_layer(), await open_layer()
        channel = await receiver.new_channel()
        await receiver.connect()
        await asyncio.gather(*(sender.send(channel, {"n": n}) for n in range(10_000)))
        received = [(await receive(receiver, channel))["n"] for _ in range(10_000)]
        assert received == list(range(10_000))

    async def test_a_group_send_never_raises_channel_full(self, open_layer: OpenLayer) -> None:
        receiver = await open_layer(local_capacity=1, remote_capacity=1)
        sender = await open_layer()
        channel = await receiver.new_channel()
        await receiver.group_add("g", channel)
        for _ in range(50):
            await sender.group_send("g", MESSAGE)
        assert statistics_of(sender).counters.group_nacked > 0
        assert await receive(receiver, channel) == MESSAGE

    async def test_a_full_queue_keeps_a_group_message_from_nobody_else(
        self, open_layer: OpenLayer
    ) -> None:
        full, other = await open_layer(local_capacity=1, remote_capacity=1), await open_layer()
        sender = await open_layer()
        full_channel, channel = await full.new_channel(), await other.new_channel()
        await full.group_add("g", full_channel)
        await other.group_add("g", channel)

        async def fill() -> None:
            while True:
                await sender.send(full_channel, MESSAGE)

        with pytest.raises(ChannelFull):
            await fill()
        with log_lines() as lines:
            for n in range(10):
                await sender.group_send("g", {"n": n})
            assert [(await receive(other, channel))["n"] for _ in range(10)] == list(range(10))
            assert statistics_of(sender).counters.group_nacked == 10

            async def send_on() -> None:
                while True:
                    await sender.group_send("g", MESSAGE)
                    await asyncio.sleep(0.02)

            # Not at once: RabbitMQ 4.2 nacks also while a queue is deleted.
            sending = asyncio.create_task(send_on())
            line = await lines.next("group messages? refused by at least one queue: .*: g ")
            # Nobody knows which queue it was, so it isn't said to be dropped.
            assert "dropped" not in line
            sending.cancel()
            await asyncio.wait([sending])

    async def test_a_message_expires_in_memory(self, open_layer: OpenLayer) -> None:
        layer = await open_layer(local_expiry=0.05)
        channel = await layer.new_channel()
        with log_lines() as lines:
            await layer.send(channel, MESSAGE)
            assert channel in await lines.next("1 message dropped: .* within local_expiry")
        await layer.send(channel, END)
        assert await receive_until_end(layer, channel) == []

    async def test_a_receiver_whose_message_expires_before_it_runs_gets_the_next_one(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer(local_expiry=1)
        channel = await layer.new_channel()
        router = inside(layer).router
        deliver = router.deliver

        def deliver_and_hold_up(*args: Any) -> None:
            router.deliver = deliver
            deliver(*args)
            time.sleep(1.2)  # as an application does that blocks the event loop

        router.deliver = deliver_and_hold_up
        receiving = asyncio.create_task(layer.receive(channel))
        await layer.send(channel, {"n": 1})
        await layer.send(channel, {"n": 2})
        assert (await asyncio.wait_for(receiving, 10))["n"] == 2
        assert statistics_of(layer).counters.expired == 1

    async def test_a_message_expires_on_the_broker(self, open_layer: OpenLayer) -> None:
        # The first is unacked and keeps the others on the broker until local_expiry is over.
        layer = await open_layer(local_capacity=1, expiry=0.05, local_expiry=0.5)
        channel = await layer.new_channel()
        with log_lines() as lines:
            for _ in range(5):
                await layer.send(channel, MESSAGE)
            await lines.next("dropped: .* within local_expiry")
        await layer.send(channel, END)
        assert await receive_until_end(layer, channel) == []
        assert statistics_of(layer).counters.delivered < 6

    async def test_a_message_for_a_process_that_is_gone_is_dropped_and_counted(
        self, open_layer: OpenLayer
    ) -> None:
        gone, sender = await open_layer(), await open_layer()
        set_retry_timeout(sender, 0.05)
        channel = await gone.new_channel()
        await gone.connect()  # else the first message, too, may find nobody
        await sender.send(channel, MESSAGE)
        await receive(gone, channel)
        await gone.close()
        await sender.send(channel, MESSAGE)
        await sender.send(channel, MESSAGE)
        assert statistics_of(sender).counters.unreachable == 2

    async def test_a_channel_of_another_process_is_refused_in_words(
        self, open_layer: OpenLayer
    ) -> None:
        one, other = await open_layer(), await open_layer()
        with pytest.raises(ValueError, match="belongs to another process"):
            await other.receive(await one.new_channel())

    async def test_the_channel_of_the_probe_is_for_nobody_else(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        probes = f"{(await layer.new_channel()).partition('!')[0]}!"
        for call in (layer.receive(probes), layer.group_add("g", probes)):
            with pytest.raises(ValueError, match="wasn't made by new_channel"):
                await call

    async def test_normal_channels_are_refused_with_the_alternative(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        for call in (
            layer.send("normal", MESSAGE),
            layer.receive("normal"),
            layer.group_add("g", "normal"),
        ):
            with pytest.raises(NotImplementedError, match="carehare_connection"):
                await call

    async def test_names_are_checked(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        for call in (
            layer.send("a b!c", MESSAGE),
            layer.receive("x" * 100),
            layer.receive(["a!b"]),  # type: ignore[arg-type]
            layer.new_channel("ä"),
            layer.new_channel("a!"),
            layer.group_add("g!", channel),
            layer.group_discard("", channel),
            layer.group_send("a/b", MESSAGE),
        ):
            with pytest.raises(TypeError, match=r"Invalid|holds a '!'"):
                await call


class TestGroups:
    async def test_members_of_all_processes_get_each_message_once(
        self, open_layer: OpenLayer
    ) -> None:
        layers = [await open_layer() for _ in range(3)]
        members = [(layer, await layer.new_channel()) for layer in layers for _ in range(3)]
        for layer, channel in members:
            await layer.group_add("g", channel)
        for n in range(5):
            await layers[0].group_send("g", {"n": n})
        await layers[0].group_send("g", END)
        for layer, channel in members:
            assert [m["n"] for m in await receive_until_end(layer, channel)] == list(range(5))

    async def test_adding_twice_and_discarding_twice(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        await layer.group_discard("g", channel)
        await layer.group_add("g", channel)
        await layer.group_add("g", channel)
        await layer.group_send("g", MESSAGE)
        await layer.send(channel, END)
        assert await receive_until_end(layer, channel) == [MESSAGE]
        await layer.group_discard("g", channel)
        await layer.group_discard("g", channel)
        await layer.group_send("g", MESSAGE)
        await layer.send(channel, END)
        assert await receive_until_end(layer, channel) == []

    async def test_each_member_gets_its_own_copy(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channels = [await layer.new_channel() for _ in range(3)]
        for channel in channels:
            await layer.group_add("g", channel)
        await layer.group_send("g", {"nested": {"list": [1]}})
        for channel in channels:
            message = await receive(layer, channel)
            assert message == {"nested": {"list": [1]}}
            message["nested"]["list"].append(2)

    async def test_what_is_sent_after_group_add_arrives_for_later_joiners_too(
        self, open_layer: OpenLayer
    ) -> None:
        sender, receiver = await open_layer(), await open_layer()
        channels = [await receiver.new_channel() for _ in range(2)]
        await sender.group_send("warm-up", MESSAGE)

        async def join_and_hear(group: str, channel: str) -> None:
            await receiver.group_add(group, channel)
            await sender.group_send(group, {"for": channel})
            while (await receive(receiver, channel))["for"] != channel:
                pass  # the other's

        for n in range(100):
            # At the same moment: the second must not return before the first's bind is confirmed.
            await asyncio.gather(*(join_and_hear(f"g{n}", channel) for channel in channels))

    async def test_leaving_and_joining_at_the_same_moment_ends_bound(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        # No linger: each leave is followed by its unbind at once.
        set_linger(layer, 0.0)
        one, two = await layer.new_channel(), await layer.new_channel()
        await layer.group_add("g", one)
        for n in range(100):
            stays, leaves = (one, two) if n % 2 else (two, one)
            await asyncio.gather(layer.group_discard("g", leaves), layer.group_add("g", stays))
            await layer.group_send("g", {"n": n})
            assert await receive(layer, stays) == {"n": n}

    async def test_five_thousand_joins_at_once(self, open_layer: OpenLayer) -> None:
        layer = await open_layer(operation_timeout=40)  # RabbitMQ 4.3 takes seconds for them.
        channel = await layer.new_channel()
        await asyncio.gather(*(layer.group_add(f"g{n}", channel) for n in range(5000)))
        for n in (0, 2046, 4999):
            await layer.group_send(f"g{n}", {"n": n})
            assert await receive(layer, channel) == {"n": n}

    async def test_a_cancelled_add_leaves_the_channel_as_it_was(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        member, other = await layer.new_channel(), await layer.new_channel()
        await layer.group_add("g", member)
        members = inside(layer).members

        adding = asyncio.create_task(layer.group_add("new", other))
        await asyncio.sleep(0)  # lets it begin to wait for the broker
        adding.cancel()
        await asyncio.wait([adding])
        assert not members.has_members("new")

        adding = asyncio.create_task(layer.group_add("g", member))
        await asyncio.sleep(0)  # the same
        adding.cancel()
        await asyncio.wait([adding])
        assert list(members.channels("g")) == [member]

    async def test_discarding_while_adding_ends_the_add_at_once(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        adding = asyncio.create_task(layer.group_add("g", channel))
        await asyncio.sleep(0)  # lets it begin to wait for the broker
        await layer.group_discard("g", channel)
        await asyncio.wait_for(adding, 5)
        assert not has_members(layer, "g")

    @pytest.mark.parametrize("room", [200, 3200])
    async def test_of_a_burst_all_arrives_but_what_is_counted_as_refused(
        self, open_layer: OpenLayer, room: int
    ) -> None:
        """More than there is room for can't arrive; what there is room for does, in order."""
        burst = 3000
        sender = await open_layer()
        receiver = await open_layer(local_capacity=100, remote_capacity=room - 100)
        channel = await receiver.new_channel()
        await receiver.group_add("g", channel)
        await sender.group_send("g", {"n": -1})
        received = [await receive(receiver, channel)]

        async def read() -> None:
            while (message := await receive(receiver, channel)) != END:
                received.append(message)

        with log_lines() as lines:
            reading = asyncio.create_task(read())
            await asyncio.gather(*(sender.group_send("g", {"n": n}) for n in range(burst)))
            refused = statistics_of(sender).counters.group_nacked
            while not reading.done():
                await sender.group_send("g", END)  # again, should the queue be full
                await asyncio.wait([reading], timeout=0.1)
            await reading
            await sender.close()  # logs what it has yet to log
            warnings = [line for line in lines.rest() if "refused by at least one" in line]
        numbers = [message["n"] for message in received]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 1 + burst - refused
        assert len(numbers) >= min(room, burst)
        assert bool(warnings) == bool(refused)
        assert len(warnings) <= 10, "not a line for each message, as 4.x has it"
        if room > burst:
            assert refused == 0

    async def test_a_channel_that_left_without_a_word_holds_up_no_other_and_keeps_its_capacity_only(
        self, open_layer: OpenLayer
    ) -> None:
        """A consumer that died without group_discard(); in 4.x it took up room for ever."""
        layer = await open_layer(local_capacity=5, capacity=10)
        dead, alive = await layer.new_channel(), await layer.new_channel()
        for channel in (dead, alive):
            await layer.group_add("g", channel)
        receiving = asyncio.create_task(receive(layer, alive))
        for n in range(40):
            await layer.group_send("g", {"n": n})
            assert await receiving == {"n": n}
            receiving = asyncio.create_task(receive(layer, alive))
        assert statistics_of(layer).buffered <= 10 + 5
        assert statistics_of(layer).counters.overflowed >= 40 - 10 - 5
        receiving.cancel()
        await asyncio.wait([receiving])


class TestNoBroker:
    async def test_every_call_ends_with_the_reason(self, open_layer: OpenLayer) -> None:
        layer = await open_layer(
            host=f"amqp://guest:s3cret@127.0.0.1:{free_port()}", operation_timeout=0.3
        )
        channel = await layer.new_channel()
        for call in (
            layer.send(channel, MESSAGE),
            layer.group_send("g", MESSAGE),
            layer.group_add("g", channel),
            inside(layer).user_connection(),
        ):
            with pytest.raises(BrokerUnavailable, match=r"No connection|not bound") as caught:
                await call
            assert isinstance(caught.value, ConnectionError)
            assert "s3cret" not in str(caught.value)
        assert not has_members(layer, "g")

    async def test_a_wrong_password_is_in_the_words_of_the_error(
        self, open_layer: OpenLayer, broker: Broker
    ) -> None:
        host = re.sub(r"//.*@", "//guest:s3cret@", broker.url)
        layer = await open_layer(host=host, operation_timeout=3)
        with pytest.raises(BrokerUnavailable, match="ACCESS_REFUSED"):
            await layer.group_send("g", MESSAGE)

    async def test_a_cancelled_call_does_not_disturb_others_that_wait_to_connect(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        sending = [asyncio.create_task(layer.send(channel, {"n": n})) for n in range(10)]
        await asyncio.sleep(0)  # lets them begin to wait
        for task in sending[::2]:
            task.cancel()
        await asyncio.wait(sending)
        received = [(await receive(layer, channel))["n"] for _ in range(5)]
        assert received == [1, 3, 5, 7, 9]


class TestUserConnection:
    async def test_it_is_open_and_the_same_each_time(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        connection = await layer.carehare_connection
        assert isinstance(connection, carehare.Connection)
        assert await layer.current_connection is connection
        awaitable = layer.carehare_connection
        assert await awaitable is await awaitable
        assert hasattr(layer, "carehare_connection")  # without a coroutine that nobody awaits
        await connection.queue_declare("", exclusive=True)

    async def test_what_goes_wrong_on_it_leaves_the_layer_alone(
        self, open_layer: OpenLayer
    ) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        connection = await layer.carehare_connection
        with pytest.raises(carehare.ChannelClosedByServer):
            await connection.queue_declare("does-not-exist", passive=True)
        await connection.close()
        await layer.send(channel, MESSAGE)
        assert await receive(layer, channel) == MESSAGE

        assert await layer.carehare_connection is not connection
        await (await layer.carehare_connection).queue_declare("", exclusive=True)


class TestClose:
    async def test_pending_and_later_receives_stop(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        receiving = [asyncio.create_task(layer.receive(channel)) for _ in range(3)]
        await layer.send(await layer.new_channel(), MESSAGE)
        await layer.close()
        for task in receiving:
            with pytest.raises(StopConsumer):
                await task
        with pytest.raises(StopConsumer):
            await layer.receive(channel)

    async def test_other_calls_end_too(self, open_layer: OpenLayer) -> None:
        async with silent_server() as server:
            layer = await open_layer(host=server.url)
            channel = await layer.new_channel()
            calls = [
                asyncio.create_task(call)
                for call in (
                    layer.send(channel, MESSAGE),
                    layer.group_send("g", MESSAGE),
                    layer.group_add("g", channel),
                )
            ]
            await server.until_accepted()
            await layer.close()
            for task in calls:
                with pytest.raises(BrokerUnavailable, match="closed"):
                    await asyncio.wait_for(task, 10)
            for call in (
                layer.send(channel, MESSAGE),
                layer.group_send("g", MESSAGE),
                layer.group_add("g", channel),
                layer.connect(),
            ):
                with pytest.raises(BrokerUnavailable, match="closed"):
                    await asyncio.wait_for(call, 5)  # operation_timeout is longer
            await server.until_gone()

    async def test_closing_unused_twice_and_at_once(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        await layer.close()
        await layer.close()
        channel = await layer.new_channel()
        with pytest.raises(StopConsumer):
            await layer.receive(channel)
        layer = await open_layer()
        await layer.group_send("g", MESSAGE)
        await asyncio.gather(layer.close(), layer.close())

    async def test_cancelling_close_still_ends_everything(self, open_layer: OpenLayer) -> None:
        async with silent_server() as server:
            layer = await open_layer(host=server.url)
            await layer.new_channel()
            await server.until_accepted()
            closing = asyncio.create_task(layer.close())
            await asyncio.sleep(0)  # lets it begin
            closing.cancel()
            await asyncio.wait([closing])
            await server.until_gone()

    @pytest.mark.parametrize("close", [True, False])
    def test_the_end_of_asyncio_run_leaves_no_trace(self, broker: Broker, close: bool) -> None:
        code = f"""
import asyncio
from channels_rabbitmq.core import RabbitmqChannelLayer

layer = RabbitmqChannelLayer(host={broker.url!r})

async def main():
    channel = await layer.new_channel()
    receiving = asyncio.create_task(layer.receive(channel))
    await layer.group_add("g", channel)
    await layer.group_send("g", {{"type": "x"}})
    print(await receiving)
    asyncio.create_task(layer.receive(channel))
    await layer.carehare_connection
    if {close}:
        await layer.close()

asyncio.run(main())
asyncio.run(main())
"""
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        expected = "{'type': 'x'}\n" * 2
        # Closing ends the pending receive with StopConsumer, which that task keeps to itself.
        errors = done.stderr.replace("Task exception was never retrieved", "")
        assert done.stdout == expected
        if close:
            assert "Task was destroyed" not in errors
            assert "Warning" not in errors
        else:
            assert without_slowness(done.stderr) == ""


async def test_each_event_loop_has_connections_and_channels_of_its_own(
    open_layer: OpenLayer, broker: Broker
) -> None:
    layer = await open_layer()
    channel = await layer.new_channel()

    def use_in_another_loop() -> None:
        async def use() -> None:
            other = await layer.new_channel()
            assert other.partition("!")[0] != channel.partition("!")[0]
            await layer.send(other, MESSAGE)
            assert await receive(layer, other) == MESSAGE
            await layer.send(channel, {"from": "another loop"})

        asyncio.run(use())

    for _ in range(2):
        await asyncio.to_thread(use_in_another_loop)
        assert await receive(layer, channel) == {"from": "another loop"}
    await layer.send(channel, END)
    assert await receive_until_end(layer, channel) == []
    assert len(loop_layers_of(layer).by_loop) <= 2, "layers of closed loops are forgotten"


async def test_operators_see_which_connection_is_what(
    open_layer: OpenLayer, broker: Broker
) -> None:
    if broker.private is None:
        pytest.skip("only a private broker can be asked for its connections")
    layer = await open_layer()
    channel = await layer.new_channel()
    await layer.send(channel, MESSAGE)
    await layer.carehare_connection
    rows = await asyncio.to_thread(broker.private.list_connections, "client_properties")
    names = [str(row["client_properties"].get("connection_name")) for row in rows]
    id_ = channel.partition("!")[0]
    assert sorted(name for name in names if id_ in name) == [
        f"channels_rabbitmq {role} {id_} ({socket.gethostname()}, pid {os.getpid()})"
        for role in ("carehare_connection", "publisher", "subscriber")
    ]


async def test_back_pressure_is_logged_with_the_worst_channel(open_layer: OpenLayer) -> None:
    layer = await open_layer(local_capacity=3)
    channel = await layer.new_channel()
    with log_lines() as lines:
        for _ in range(4):
            await layer.send(channel, MESSAGE)
        assert f"{channel} (3" in await lines.next("all of local_capacity is in use")


async def test_a_loop_whose_tasks_were_all_cancelled_leaves_nobody_waiting(
    open_layer: OpenLayer,
) -> None:
    layer = await open_layer()
    channel = await layer.new_channel()
    await layer.send(channel, MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    receiving = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0)  # lets it begin to wait
    for task in asyncio.all_tasks() - {asyncio.current_task(), receiving}:
        task.cancel()
    with pytest.raises(StopConsumer):
        await asyncio.wait_for(receiving, 10)
    with pytest.raises(BrokerUnavailable, match="closed"):
        await layer.send(channel, MESSAGE)


async def test_the_first_callers_context_is_not_kept(open_layer: OpenLayer) -> None:
    """What it holds (a request, a trace) would live as long as the connections."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    layer = await open_layer()
    loop_layer = inside(layer)
    seen: list[str] = []
    for supervisor in loop_layer.connections.supervisors:
        supervisor.on_ready = lambda: seen.append(variable.get())

    async def serve() -> None:
        variable.set("mine")
        channel = await layer.new_channel()
        await layer.send(channel, MESSAGE)
        await layer.carehare_connection

    await asyncio.create_task(serve())
    assert seen == ["none"] * 3


def test_on_uvloop(broker: Broker, groups_exchange: str) -> None:
    async def use() -> None:
        layer = RabbitmqChannelLayer(host=broker.url, groups_exchange=groups_exchange)
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        for n in range(100):
            await layer.send(channel, {"n": n})
            await layer.group_send("g", {"body": b"x" * 10000})
            assert await receive(layer, channel) == {"n": n}
            assert await receive(layer, channel) == {"body": b"x" * 10000}
        await layer.close()

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(use())
    finally:
        loop.close()
