"""Normal channels: names without "!", each a queue that all processes share."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import ChannelFull, StopConsumer
from pamqp import commands

from channels_rabbitmq._broker import normal_receiver as _normal_receiver
from channels_rabbitmq._codec import MessageCodec
from channels_rabbitmq._loops.process import current
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy
from tests.support.brokers import Broker
from tests.support.cancelling import receive_cancelling
from tests.support.changes import until
from tests.support.layers import close_for_sync_code, statistics_of
from tests.support.log_lines import log_lines
from tests.support.loop_thread import LoopThread
from tests.support.members import receive
from tests.support.normal_channels import (
    consumers,
    delete_queue,
    on_amqp_channel,
    queue_of,
    ready_messages,
    until_ready,
)

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


@pytest.fixture
def jobs() -> str:
    """A name that no other test uses."""
    return f"jobs-{secrets.token_hex(4)}"


@pytest.fixture
async def queue(broker: Broker, groups_exchange: str, jobs: str) -> AsyncIterator[str]:
    """The name of its queue, which would stay for a day."""
    name = queue_of(groups_exchange, jobs)
    yield name
    await delete_queue(broker.url, name)


@pytest.fixture
def open_one(open_layer: OpenLayer, queue: str) -> OpenLayer:
    async def open_one(**config: Any) -> RabbitmqChannelLayer:
        return await open_layer(normal_channels=True, **config)

    return open_one


def waiting_in(layer: RabbitmqChannelLayer) -> int:
    return sum(one.receivers for one in layer.statistics())


async def numbers(layer: RabbitmqChannelLayer, channel: str, count: int) -> list[int]:
    return [(await receive(layer, channel))["n"] for _ in range(count)]


# There and back


async def test_messages_go_to_any_process_in_order(open_one: OpenLayer, jobs: str) -> None:
    sender, receiver = await open_one(), await open_one()
    for n in range(5):
        await sender.send(jobs, {"type": "job", "n": n, "data": b"\0"})
    assert await receive(receiver, jobs) == {"type": "job", "n": 0, "data": b"\0"}
    assert await numbers(receiver, jobs, 4) == [1, 2, 3, 4]
    counters = statistics_of(receiver).counters
    assert (counters.normal_consumed, counters.consumed, counters.delivered) == (5, 0, 0)


async def test_a_process_that_only_sends_has_one_connection(open_one: OpenLayer, jobs: str) -> None:
    layer = await open_one()
    await layer.send(jobs, {"type": "job"})
    statistics = statistics_of(layer)
    assert statistics.publisher.state == "connected"
    assert {statistics.subscriber.state, statistics.normal_channels.state} == {"idle"}


async def test_who_waits_first_gets_it(open_one: OpenLayer, jobs: str) -> None:
    layer = await open_one()
    waiting = [asyncio.create_task(layer.receive(jobs)) for _ in range(10)]
    await until(lambda: waiting_in(layer) == 10)
    for n in range(10):
        await layer.send(jobs, {"type": "job", "n": n})
    assert [message["n"] for message in await asyncio.gather(*waiting)] == list(range(10))
    assert waiting_in(layer) == 0


async def test_large_and_empty_messages(open_one: OpenLayer, jobs: str) -> None:
    layer = await open_one()
    for message in ({}, {"type": "x", "data": bytes(3_000_000)}):
        await layer.send(jobs, message)
        assert await receive(layer, jobs) == message


@pytest.mark.parametrize(
    "config", [{"symmetric_encryption_keys": ["key"]}, {"serializer": "json"}], ids=str
)
async def test_other_bodies(open_one: OpenLayer, jobs: str, config: dict[str, Any]) -> None:
    layer = await open_one(**config)
    await layer.send(jobs, {"type": "x"})
    assert await receive(layer, jobs) == {"type": "x"}


async def test_each_has_a_queue_of_its_own(
    open_one: OpenLayer, broker: Broker, groups_exchange: str, jobs: str
) -> None:
    layer = await open_one()
    await layer.send(jobs, {"type": "x", "n": 1})
    await layer.send(f"{jobs}.2", {"type": "x", "n": 2})
    assert await numbers(layer, f"{jobs}.2", 1) == [2]
    assert await numbers(layer, jobs, 1) == [1]
    await delete_queue(broker.url, queue_of(groups_exchange, f"{jobs}.2"))


async def test_two_exchanges_share_no_queue(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str, jobs: str
) -> None:
    """Names may hold periods: what is sent by one exchange isn't received by another."""
    other_exchange = f"{groups_exchange}.chat"
    one = await open_layer(normal_channels=True)
    other = await open_layer(normal_channels=True, groups_exchange=other_exchange)
    await one.send(f"chat.{jobs}", {"type": "x", "n": 1})
    await other.send(jobs, {"type": "x", "n": 2})
    assert await numbers(other, jobs, 1) == [2]
    assert await numbers(one, f"chat.{jobs}", 1) == [1]
    await delete_queue(broker.url, queue_of(groups_exchange, f"chat.{jobs}"))
    await delete_queue(broker.url, queue_of(other_exchange, jobs))


# Off by default


async def test_without_the_option_the_error_tells_of_it(open_layer: OpenLayer) -> None:
    layer = await open_layer()
    for call in (layer.send("jobs", {"type": "x"}), layer.receive("jobs")):
        with pytest.raises(NotImplementedError, match="set the option normal_channels to True"):
            await call
    with pytest.raises(NotImplementedError, match="set the option normal_channels to True"):
        await layer.group_add("g", "jobs")
    for statistics in layer.statistics():  # nothing was opened for it
        assert {statistics.publisher.state, statistics.normal_channels.state} == {"idle"}


async def test_groups_may_have_them(open_one: OpenLayer, jobs: str) -> None:
    """Each process may add and discard, and each message goes to one receiver of the channel."""
    layer, other = await open_one(), await open_one()
    await layer.group_add("g", jobs)
    await other.group_send("g", {"type": "x", "n": 1, "list": []})
    assert await receive(other, jobs) == {"type": "x", "n": 1, "list": []}
    await layer.group_add("g", jobs)
    specific = await other.new_channel()
    await other.group_add("g", specific)
    await layer.group_send("g", {"type": "x", "n": 2})
    assert await numbers(layer, jobs, 1) == [2]
    assert await numbers(other, specific, 1) == [2]
    await other.group_discard("g", jobs)
    await layer.group_discard("other", jobs)
    await layer.group_send("g", {"type": "x", "n": 3})
    await layer.send(jobs, {"type": "x", "n": 4})
    assert await numbers(layer, jobs, 1) == [4]


async def test_memberships_outlive_a_deleted_queue(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    layer = await open_one()
    await layer.group_add("g", jobs)
    waiting = asyncio.create_task(numbers(layer, jobs, 1))
    await until_consumed(broker, queue)
    await delete_queue(broker.url, queue)
    await until_consumed(broker, queue)
    await layer.group_send("g", {"type": "x", "n": 1})
    assert await waiting == [1]


async def test_a_deleted_queue_can_join_a_group(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    layer = await open_one()
    await layer.group_add("first", jobs)
    await delete_queue(broker.url, queue)
    await layer.group_add("g", jobs)
    for n, group in enumerate(("first", "g")):
        await layer.group_send(group, {"type": "x", "n": n})
    assert await numbers(layer, jobs, 2) == [0, 1]


async def test_group_calls_of_sync_code(open_one: OpenLayer, jobs: str) -> None:
    layer = await open_one()

    def run() -> list[int]:
        async_to_sync(layer.group_add)("g", jobs)
        async_to_sync(layer.group_send)("g", {"type": "x", "n": 1})
        heard = async_to_sync(layer.receive)(jobs)
        async_to_sync(layer.group_discard)("g", jobs)
        async_to_sync(layer.group_send)("g", {"type": "x", "n": 2})
        async_to_sync(layer.send)(jobs, {"type": "x", "n": 3})
        more = async_to_sync(layer.receive)(jobs)
        async_to_sync(layer.close)()
        return [heard["n"], more["n"]]

    assert await asyncio.to_thread(run) == [1, 3]


@pytest.mark.parametrize("name", ["", "a b", "jöbs", 100 * "x", 1, None, []])
async def test_bad_names(open_layer: OpenLayer, name: Any) -> None:
    layer = await open_layer(normal_channels=True)
    for call in (layer.send(name, {"type": "x"}), layer.receive(name)):
        with pytest.raises(TypeError, match="Invalid channel name"):
            await call


# Who gets what


async def test_workers_of_different_speed(open_one: OpenLayer, jobs: str) -> None:
    """No job waits behind a busy worker while another one is free."""
    slow, fast, sender = await open_one(), await open_one(), await open_one()
    first = asyncio.create_task(receive(slow, jobs))
    await until(lambda: waiting_in(slow) == 1)
    for n in range(30):
        await sender.send(jobs, {"type": "job", "n": n})
    assert (await first)["n"] == 0  # It works on that one until the end of this test.
    assert await numbers(fast, jobs, 29) == list(range(1, 30))


async def test_who_took_one_and_stopped_holds_nothing(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    layer = await open_one()
    for n in range(3):
        await layer.send(jobs, {"type": "job", "n": n})
    assert await numbers(layer, jobs, 1) == [0]
    await until_ready(broker.url, queue, 2)
    assert await consumers(broker.url, queue) == 0
    assert await numbers(await open_one(), jobs, 2) == [1, 2]


async def test_a_cancelled_call_has_taken_nothing(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    layer, sender = await open_one(), await open_one()
    receiving = asyncio.create_task(receive_cancelling(layer, jobs, 300, turns=12))
    other = asyncio.create_task(receive_cancelling(layer, jobs, 300, turns=12))
    for n in range(600):
        await sender.send(jobs, {"type": "job", "n": n})
    received = await asyncio.gather(receiving, other)
    assert Counter(received[0] + received[1]) == Counter(range(600))
    await until_ready(broker.url, queue, 0)
    assert waiting_in(layer) == 0
    assert statistics_of(layer).normal_channels.reconnects == 0


async def test_a_message_for_nobody_goes_back(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    """It was under way when the call was cancelled."""
    async with AmqpProxy(broker.url) as proxy:
        layer, other = await open_one(host=proxy.url), await open_one()
        delivered = proxy.hold(TO_CLIENT, commands.Basic.Deliver)
        await other.send(jobs, {"type": "job", "n": 1})
        waiting = asyncio.create_task(layer.receive(jobs))
        await proxy.seen(TO_CLIENT, commands.Basic.Deliver)
        waiting.cancel()
        await asyncio.wait([waiting])
        delivered.set()
        await proxy.seen(TO_BROKER, commands.Basic.Nack)
        assert await numbers(other, jobs, 1) == [1]


# In order


async def test_200_first_sends_at_once(open_one: OpenLayer, broker: Broker, jobs: str) -> None:
    async with AmqpProxy(broker.url) as proxy:
        sender = await open_one(host=proxy.url)
        await asyncio.gather(*(sender.send(jobs, {"type": "job", "n": n}) for n in range(200)))
        assert proxy.count(TO_BROKER, commands.Queue.Declare) == 1
        assert proxy.count(TO_CLIENT, commands.Basic.Return) == 1  # the ping
        assert await numbers(await open_one(), jobs, 200) == list(range(200))


async def test_200_sends_at_once_to_a_queue_that_is_gone(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    """They are returned; others come meanwhile, and overtake none of them."""
    async with AmqpProxy(broker.url) as proxy:
        sender = await open_one(host=proxy.url)
        await sender.send(jobs, {"type": "job"})
        await delete_queue(broker.url, queue)
        sends = [
            asyncio.create_task(sender.send(jobs, {"type": "job", "n": n})) for n in range(200)
        ]
        await proxy.seen(TO_CLIENT, commands.Basic.Return, 3)  # the ping was the first
        for n in range(200, 260):
            sends.append(asyncio.create_task(sender.send(jobs, {"type": "job", "n": n})))
            await asyncio.sleep(0)
        await asyncio.gather(*sends)
        assert proxy.count(TO_BROKER, commands.Queue.Declare) == 2
        assert await numbers(await open_one(), jobs, 260) == list(range(260))


# What is there, or is gone


async def test_a_queue_with_other_arguments_is_used_as_it_is(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    await on_amqp_channel(
        broker.url, lambda amqp_channel: amqp_channel.queue_declare(queue, durable=True)
    )
    layer, other = await open_one(), await open_one()
    with log_lines() as lines:
        for n in range(3):
            await asyncio.gather(layer.send(jobs, {"type": "job", "n": n}), numbers(layer, jobs, 1))
        await other.send(jobs, {"type": "job", "n": 3})
        assert await numbers(layer, jobs, 1) == [3]
        warnings = [line for line in lines.all if "is used as it is" in line]
    assert len(warnings) == 2, "one for each process"
    assert f"the queue of the normal channel {jobs} is used as it is: " in warnings[0]
    assert "406 PRECONDITION_FAILED - inequivalent arg 'x-" in warnings[0]


async def test_processes_with_other_settings_share_it(open_one: OpenLayer, jobs: str) -> None:
    layer, other = await open_one(expiry=60), await open_one(expiry=30)
    await layer.send(jobs, {"type": "job", "n": 1})
    assert await numbers(other, jobs, 1) == [1]
    await other.send(jobs, {"type": "job", "n": 2})
    assert await numbers(layer, jobs, 1) == [2]


async def test_the_queue_is_deleted(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    sender, receiver = await open_one(), await open_one()
    await sender.send(jobs, {"type": "job", "n": 0})
    assert await numbers(receiver, jobs, 1) == [0]
    # while nobody waits,
    await delete_queue(broker.url, queue)
    waiting = asyncio.create_task(numbers(receiver, jobs, 1))
    while not await _is_consumed(broker, queue):  # noqa: ASYNC110 - no queue tells it
        await asyncio.sleep(0.01)
    # and while somebody does,
    await delete_queue(broker.url, queue)
    await sender.send(jobs, {"type": "job", "n": 1})
    assert await waiting == [1]
    # and before it is sent to
    await delete_queue(broker.url, queue)
    await sender.send(jobs, {"type": "job", "n": 2})
    assert await numbers(receiver, jobs, 1) == [2]
    assert statistics_of(receiver).normal_channels.reconnects == 0


async def _is_consumed(broker: Broker, queue: str) -> bool:
    import pika.exceptions  # type: ignore[import-untyped]  # has no annotations

    try:
        return await consumers(broker.url, queue) == 1
    except pika.exceptions.ChannelClosedByBroker:  # not there yet
        return False


async def test_the_groups_exchange_is_deleted(
    open_one: OpenLayer, broker: Broker, groups_exchange: str, jobs: str
) -> None:
    sender, receiver = await open_one(), await open_one()
    await sender.send(jobs, {"type": "job", "n": 0})
    assert await numbers(receiver, jobs, 1) == [0]
    waiting = asyncio.create_task(numbers(receiver, jobs, 1))
    await until(lambda: waiting_in(receiver) == 1)
    await on_amqp_channel(
        broker.url, lambda amqp_channel: amqp_channel.exchange_delete(groups_exchange)
    )
    # The first one finds it out, and may be lost.
    await sender.send(jobs, {"type": "job", "n": 1})
    await sender.send(jobs, {"type": "job", "n": 1})
    assert await waiting == [1]


async def test_the_exchange_is_deleted_before_the_first_bind(
    open_one: OpenLayer, broker: Broker, groups_exchange: str, jobs: str
) -> None:
    sender, receiver = await open_one(), await open_one()
    await sender.connect()
    await receiver.send(jobs, {"type": "job", "n": 0})
    assert await numbers(receiver, jobs, 1) == [0]
    await on_amqp_channel(
        broker.url, lambda amqp_channel: amqp_channel.exchange_delete(groups_exchange)
    )
    with pytest.raises(BrokerUnavailable, match="no exchange"):
        await sender.send(jobs, {"type": "job", "n": 1})
    await sender.send(jobs, {"type": "job", "n": 2})
    assert await numbers(receiver, jobs, 1) == [2]


async def test_connections_are_lost(open_one: OpenLayer, broker: Broker, jobs: str) -> None:
    """None is lost; one may come twice for each loss, if the ack was lost with the connection.

    A receiver gets the next message only when RabbitMQ has the ack of the one before. So each
    connection that was lost has cost one ack at most, whoever or whatever has ended it.
    """
    async with AmqpProxy(broker.url) as proxy:
        sender, receiver = await open_one(), await open_one(host=proxy.url)
        received: list[int] = []

        async def work() -> None:
            while len(set(received)) < 200:
                received.append((await receiver.receive(jobs))["n"])

        working = asyncio.create_task(work())
        for n in range(200):
            if n % 50 == 20:
                await until(lambda: statistics_of(receiver).normal_channels.state == "connected")
                proxy.cut()
            await sender.send(jobs, {"type": "job", "n": n})
        await working
        losses = statistics_of(receiver).normal_channels.reconnects
        assert losses > 0
        assert len(received) <= 200 + losses


async def test_what_is_reserved_on_a_lost_connection_is_forgotten(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        receiver, other = await open_one(host=proxy.url), await open_one()
        waiting = asyncio.create_task(numbers(receiver, jobs, 1))
        await until_consumed(broker, queue)
        # In one turn of the loop the message comes, and the connection ends.
        handler: Any = receiver._loop_layer().normal_channels.receiver  # type: ignore[attr-defined]
        consumer = handler._consumers[jobs]
        body = MessageCodec(max_message_size=1000).encode_for_channel(jobs, {"type": "x", "n": 7})
        handler._on_delivery(consumer.tag, body, 1, consumer.amqp_channel)
        handler.supervisor.reconnect("a test wants it so")
        handler.on_lost("a test wants it so")
        await other.send(jobs, {"type": "job", "n": 8})
        assert await waiting == [8]


async def until_consumed(broker: Broker, queue: str) -> None:
    while not await _is_consumed(broker, queue):  # noqa: ASYNC110 - no queue tells it
        await asyncio.sleep(0.01)


# Full, late, wrong


async def test_a_full_queue(open_one: OpenLayer, jobs: str) -> None:
    layer = await open_one(channel_capacity={jobs: 3})
    for n in range(3):
        await layer.send(jobs, {"type": "job", "n": n})
    with pytest.raises(ChannelFull, match=f"the normal channel {jobs} is full"):
        await layer.send(jobs, {"type": "job", "n": 3})
    assert statistics_of(layer).counters.nacked == 1
    assert await numbers(layer, jobs, 3) == [0, 1, 2]


async def test_a_queue_that_is_full_in_bytes(open_one: OpenLayer, jobs: str) -> None:
    layer = await open_one(max_message_size=2000, remote_capacity_bytes=3000)

    async def send_five() -> None:
        for n in range(5):
            await layer.send(jobs, {"type": "job", "n": n, "data": bytes(1500)})

    with pytest.raises(ChannelFull, match="remote_capacity_bytes"):
        await send_five()
    assert statistics_of(layer).counters.nacked == 1
    assert await numbers(layer, jobs, 1) == [0]


async def test_expired_messages_are_dropped(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    layer = await open_one(expiry=0.05)
    await layer.send(jobs, {"type": "job"})
    await until_ready(broker.url, queue, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"junk", "not msgpack"),
        ({"type": "x"}, "no recipient"),
        ({"type": "x", "__asgi_channel__": "other"}, "for another recipient"),
        ({"type": "x", "__asgi_group__": 1}, "a recipient that is not"),
    ],
    ids=range(4),
)
async def test_wrong_bodies_are_counted_and_forgotten(
    open_one: OpenLayer, broker: Broker, groups_exchange: str, jobs: str, content: Any, reason: str
) -> None:
    layer = await open_one()
    waiting = asyncio.create_task(numbers(layer, jobs, 1))
    await layer.send(jobs, {"type": "job", "n": 1})
    assert await waiting == [1]
    body = content if isinstance(content, bytes) else msgpack.packb(content)
    await on_amqp_channel(
        broker.url,
        lambda amqp_channel: amqp_channel.basic_publish(groups_exchange, f"!channel.{jobs}", body),
    )
    with log_lines() as lines:
        await layer.send(jobs, {"type": "job", "n": 2})
        assert await numbers(layer, jobs, 1) == [2]
        assert reason in await lines.next("not in this layer's format")
    assert statistics_of(layer).counters.malformed == 1


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"serializer": "json"}, "by the serializer msgpack, while it is json here"),
        ({"symmetric_encryption_keys": ["key"]}, "not encrypted, but"),
    ],
    ids=["serializer", "key"],
)
async def test_messages_for_other_settings_are_left_to_others(
    open_one: OpenLayer,
    jobs: str,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    reason: str,
) -> None:
    """While a project changes its workers one after the other, none is lost."""
    monkeypatch.setattr(_normal_receiver, "OTHERS_TURN", 0.2)
    changed, former = await open_one(**config), await open_one()
    waiting = asyncio.create_task(numbers(changed, jobs, 1))
    await until(lambda: waiting_in(changed) == 1)
    with log_lines() as lines:
        for n in range(100):
            await former.send(jobs, {"type": "job", "n": n})
        assert reason in await lines.next(f"channel {jobs} are left to other processes: ")
        received = await numbers(former, jobs, 100)
        assert sorted(received) == list(range(100))
        await changed.send(jobs, {"type": "job", "n": 100})
        assert await waiting == [100]
        assert len([line for line in lines.all if "are left to other" in line]) == 1
    assert statistics_of(changed).counters.malformed == 0


async def test_other_programs_may_send(
    open_one: OpenLayer, broker: Broker, groups_exchange: str, jobs: str
) -> None:
    layer = await open_one()
    waiting = asyncio.create_task(receive(layer, jobs))
    await layer.send(jobs, {"type": "first"})
    assert await waiting == {"type": "first"}
    body = msgpack.packb({"type": "x", "__asgi_channel__": jobs})
    await on_amqp_channel(
        broker.url,
        lambda amqp_channel: amqp_channel.basic_publish(groups_exchange, f"!channel.{jobs}", body),
    )
    assert await receive(layer, jobs) == {"type": "x"}


# Loops, threads, sync code, the end


async def test_two_loops_share_the_work(open_one: OpenLayer, jobs: str) -> None:
    layer = await open_one()
    with LoopThread() as thread:
        there = thread.submit(numbers(layer, jobs, 10))
        here = asyncio.create_task(numbers(layer, jobs, 10))
        await until(lambda: sum(one.receivers for one in layer.statistics()) == 2)
        for n in range(20):
            await layer.send(jobs, {"type": "job", "n": n})
        assert sorted(await here + await there) == list(range(20))
        await thread.run(layer.close())


async def test_sync_code(open_one: OpenLayer, jobs: str) -> None:
    layer = await open_one()

    def work() -> list[int]:
        async_to_sync(layer.send)(jobs, {"type": "job", "n": 1})
        heard = [async_to_sync(layer.receive)(jobs)["n"] for _ in range(3)]
        async_to_sync(layer.close)()
        return heard

    working = asyncio.create_task(asyncio.to_thread(work))
    for n in (2, 3):
        await layer.send(jobs, {"type": "job", "n": n})
    assert sorted(await working) == [1, 2, 3]


async def test_sync_code_that_is_cancelled_has_taken_nothing(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    layer = await open_one()

    def work() -> list[int]:
        return async_to_sync(receive_cancelling)(layer, jobs, 200, turns=12)

    working = asyncio.create_task(asyncio.to_thread(work))
    for n in range(200):
        await layer.send(jobs, {"type": "job", "n": n})
    assert Counter(await working) == Counter(range(200))
    await until_ready(broker.url, queue, 0)
    await close_for_sync_code(layer)


async def test_close_ends_those_who_wait(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str
) -> None:
    layer = await open_one()
    waiting = asyncio.create_task(layer.receive(jobs))
    await until_consumed(broker, queue)
    await layer.close()
    for call in (waiting, layer.receive(jobs)):
        with pytest.raises(StopConsumer):
            await call
    with pytest.raises(BrokerUnavailable):
        await layer.send(jobs, {"type": "x"})
    assert await consumers(broker.url, queue) == 0


async def test_an_outage_is_no_error_for_receivers(open_one: OpenLayer, jobs: str) -> None:
    from tools.private_broker import free_port

    layer = await open_one(host=f"amqp://127.0.0.1:{free_port()}", operation_timeout=0.1)
    waiting = asyncio.create_task(layer.receive(jobs))
    with pytest.raises(BrokerUnavailable):
        await layer.send(jobs, {"type": "x"})
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_the_queue_lives_on(
    open_one: OpenLayer, broker: Broker, queue: str, jobs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages wait without any process; an unused queue goes, in the end."""
    prepare = lambda settings, shared: replace(settings, normal_queue_expiry=1.0)  # noqa: E731
    monkeypatch.setattr(current(), "prepare", prepare)
    layer = await open_one()
    await layer.send(jobs, {"type": "job", "n": 1})
    await layer.close()
    assert await ready_messages(broker.url, queue) == 1
    while await _exists(broker, queue):  # noqa: ASYNC110 - no queue tells it
        await asyncio.sleep(0.1)


async def _exists(broker: Broker, queue: str) -> bool:
    import pika.exceptions  # type: ignore[import-untyped]  # has no annotations

    try:
        # A passive declare would be a use, and the queue stay.
        await on_amqp_channel(
            broker.url, lambda amqp_channel: amqp_channel.queue_bind(queue, "amq.direct", "x")
        )
    except pika.exceptions.ChannelClosedByBroker:
        return False
    return True
