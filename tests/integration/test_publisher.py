"""The connection that publishes: what its set-up finds out, and how a full or sick broker shows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pamqp.commands
import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy
from tests.support.brokers import Broker
from tests.support.layers import statistics_of
from tests.support.log_lines import log_lines
from tests.support.patience import connect_patiently

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}
commands = pamqp.commands


async def test_set_up_declares_the_groups_exchange_and_pings_the_broker(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str
) -> None:
    declared: list[Any] = []
    published: list[Any] = []
    async with AmqpProxy(broker.url) as proxy:
        proxy.rule(TO_BROKER, commands.Exchange.Declare, lambda f: declared.append(f.decode()) or f)
        proxy.rule(TO_BROKER, commands.Basic.Publish, lambda f: published.append(f.decode()) or f)
        layer = await open_layer(host=proxy.url)
        await layer.group_send("g", MESSAGE)
    (exchange,) = declared
    # As channels_rabbitmq 4.x and other programs declare it; anything else would be refused.
    assert (exchange.exchange, exchange.exchange_type) == (groups_exchange, "direct")
    assert not any([exchange.durable, exchange.auto_delete, exchange.internal])
    assert [(p.exchange, p.routing_key, p.mandatory) for p in published] == [
        (groups_exchange, "!ping", True),
        (groups_exchange, "g", False),
    ]


async def test_blocked_while_connecting(open_layer: OpenLayer, broker: Broker) -> None:
    async with AmqpProxy(broker.url) as proxy:
        # An alarm: the ping's confirm doesn't come, "blocked" does.
        blocked = commands.Connection.Blocked(reason="low on tests")
        proxy.rule(
            TO_CLIENT,
            commands.Basic.Ack,
            lambda frame: proxy.inject(blocked),
            times=1,
        )
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        with log_lines() as lines:
            with pytest.raises(ChannelFull, match="low on memory"):
                await layer.send(channel, MESSAGE)
            await lines.next("WARNING publisher .*: RabbitMQ blocks publishers: low on tests")
            await layer.group_send("g", MESSAGE)
            assert statistics_of(layer).counters.blocked == 2
            await lines.next("1 group message dropped: RabbitMQ blocks publishers: g ")
            proxy.inject(commands.Connection.Unblocked())
            await lines.next("WARNING publisher .*: RabbitMQ takes messages again")
        await layer.send(channel, MESSAGE)
        assert await layer.receive(channel) == MESSAGE


async def test_a_nack_is_a_count_for_a_group_and_a_lost_node_if_all_is_refused(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        await layer.send(channel, MESSAGE)

        def refuse(frame: Any) -> Any:
            ack = frame.decode()
            return commands.Basic.Nack(delivery_tag=ack.delivery_tag, multiple=ack.multiple)

        proxy.rule(TO_CLIENT, commands.Basic.Ack, refuse)
        await layer.group_send("g", MESSAGE)
        assert statistics_of(layer).counters.group_nacked == 1
        await layer.send(channel, MESSAGE)
        counters = statistics_of(layer).counters
        assert (counters.nacked, counters.unreachable) == (0, 1)


async def test_a_ping_without_an_answer_is_another_attempt(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        proxy.drop(TO_CLIENT, commands.Basic.Ack, times=1)
        layer = await open_layer(host=proxy.url, connect_timeout=0.5)
        await layer.group_send("g", MESSAGE)
        assert proxy.opened == 2


async def test_a_body_too_large_for_the_broker_costs_a_reconnect_not_the_layer(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        await layer.group_send("g", MESSAGE)
        too_large = commands.Channel.Close(
            reply_code=406, reply_text="PRECONDITION_FAILED", class_id=60, method_id=40
        )
        proxy.rule(
            TO_BROKER,
            commands.Basic.Publish,
            lambda frame: proxy.inject(too_large, channel=frame.channel),
            times=1,
        )
        with log_lines() as lines:
            await layer.group_send("g", MESSAGE)
            await lines.next("WARNING publisher .*: lost .* 406 PRECONDITION_FAILED")
        assert statistics_of(layer).counters.outcome_unknown == 1
        await layer.group_send("g", MESSAGE)
        assert statistics_of(layer).counters.outcome_unknown == 1


async def test_calls_that_wait_for_the_connection_are_sent_in_their_order(
    open_layer: OpenLayer,
) -> None:
    layer = await open_layer()
    channel = await layer.new_channel()
    sending = [asyncio.create_task(layer.send(channel, {"n": n})) for n in range(50)]
    assert [(await layer.receive(channel))["n"] for _ in range(50)] == list(range(50))
    await asyncio.gather(*sending)


async def test_nothing_is_written_when_the_time_was_over_before_there_was_a_connection(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        released = proxy.hold(TO_CLIENT, commands.Connection.Tune)
        layer = await open_layer(host=proxy.url, operation_timeout=0.1)
        with pytest.raises(BrokerUnavailable):
            await layer.group_send("late", MESSAGE)
        released.set()
        await connect_patiently(layer)
        assert statistics_of(layer).counters.published == 0


async def test_a_broker_that_does_not_read_fills_no_memory(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url, operation_timeout=1)
        await connect_patiently(layer)
        await layer.group_send("g", MESSAGE)
        before = statistics_of(layer).counters.published
        proxy.stall(TO_BROKER)
        channel = f"{statistics_of(layer).id}-gone!x"  # nobody's
        sending = [
            asyncio.create_task(layer.send(channel, {"body": b"x" * 2**20})) for _ in range(100)
        ]
        sending[50].cancel()
        done, _ = await asyncio.wait(sending, timeout=20)
        assert len(done) == 100
        # What went out before anybody could notice: the buffers of two sockets and of the proxy.
        written = statistics_of(layer).counters.published - before
        assert written < 40
        outcomes = [type(task.exception()) for task in sending if not task.cancelled()]
        assert outcomes.count(ChannelFull) == 99 - written
        proxy.resume()


async def test_a_call_that_waits_for_room_has_its_turn_when_the_broker_reads_again(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url, remote_capacity=1000)
        channel = await layer.new_channel()
        await layer.send(channel, {"n": -1, "body": b""})
        proxy.stall(TO_BROKER)
        sending = [
            asyncio.create_task(layer.send(channel, {"n": n, "body": b"x" * 2**20}))
            for n in range(60)
        ]
        for _ in range(100):
            await asyncio.sleep(0)  # lets them fill the buffers, which are smaller than 40 MiB
        for task in sending[40:50]:
            task.cancel()
        # It publishes a question.
        counting = asyncio.create_task(layer.group_count("g", timeout=10))
        await asyncio.sleep(0.1)
        assert not counting.done()
        proxy.resume()
        assert await counting == 0
        received = [(await layer.receive(channel))["n"] for _ in range(51)]
        assert received == [-1, *range(40), *range(50, 60)]
        await asyncio.wait(sending)


async def test_an_amqp_channel_that_ends_as_the_set_up_does_is_another_attempt(
    open_layer: OpenLayer, broker: Broker
) -> None:
    """It ended between two turns of the loop, and publish() never let the loop have another."""
    async with AmqpProxy(broker.url) as proxy:
        close = commands.Channel.Close(504, "CHANNEL_ERROR", 60, 40)
        proxy.rule(TO_CLIENT, commands.Basic.Ack, lambda frame: [frame, close], times=1)
        proxy.rule(
            TO_CLIENT,
            commands.Basic.Ack,
            lambda frame: [commands.Connection.Blocked("low on tests"), close],
            times=1,
        )
        layer = await open_layer(host=proxy.url)
        await asyncio.wait_for(layer.group_send("g", MESSAGE), 10)
        assert proxy.opened == 3


async def test_a_call_that_waited_for_the_connection_has_only_the_rest_of_its_time(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        released = proxy.hold(TO_CLIENT, commands.Connection.Tune)
        layer = await open_layer(host=proxy.url, operation_timeout=1.5)
        loop = asyncio.get_running_loop()
        begun_at = loop.time()
        sending = asyncio.create_task(layer.group_send("g", MESSAGE))
        await proxy.seen(TO_CLIENT, commands.Connection.Tune)
        await asyncio.sleep(1)  # of its 1.5 s
        acks = proxy.count(TO_CLIENT, commands.Basic.Ack)
        seen = 0

        def keep_the_second(frame: Any) -> Any:
            nonlocal seen
            seen += 1
            return frame if seen == 1 else None  # the first is the ping's

        proxy.rule(TO_CLIENT, commands.Basic.Ack, keep_the_second)
        released.set()
        await sending
        assert statistics_of(layer).counters.outcome_unknown == 1
        assert acks == 0
        assert loop.time() - begun_at < 2.4  # 1.5 s, and not 1 + 1.5 s
