"""Calls that wait, for a connection or for anything else of ours, go in the order they came in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pamqp.commands
import pytest
from asgiref.sync import async_to_sync

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy, Frame
from tests.support.brokers import Broker
from tests.support.layers import publisher_of

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

commands = pamqp.commands

GROUP = "room"
ROOMY: dict[str, Any] = {"local_capacity": 10_000, "remote_capacity": None}


class Receiver:
    """A channel on a layer of its own, which is in GROUP."""

    async def open(self, open_layer: OpenLayer) -> Receiver:
        self.layer = await open_layer(**ROOMY)
        self.channel = await self.layer.new_channel()
        await self.layer.group_add(GROUP, self.channel)
        return self

    async def hear(self, count: int) -> list[int]:
        heard = [await asyncio.wait_for(self.layer.receive(self.channel), 20) for _ in range(count)]
        return [message["n"] for message in heard]


@pytest.fixture
async def receiver(open_layer: OpenLayer) -> Receiver:
    return await Receiver().open(open_layer)


class Caller:
    """Makes calls of both kinds by turns, each in a task, and numbers them."""

    def __init__(self, layer: RabbitmqChannelLayer, channel: str, body: bytes = b"") -> None:
        self._layer = layer
        self._channel = channel
        self._body = body
        self.tasks: list[asyncio.Task[None]] = []

    def call(self) -> asyncio.Task[None]:
        message = {"n": len(self.tasks), "body": self._body}
        if len(self.tasks) % 2:
            call = self._layer.group_send(GROUP, message)
        else:
            call = self._layer.send(self._channel, message)
        self.tasks.append(asyncio.create_task(call))
        return self.tasks[-1]

    async def call_each_turn_until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self.call()
            await asyncio.sleep(0)


async def test_in_each_turn_of_the_loop_while_it_connects(
    open_layer: OpenLayer, receiver: Receiver
) -> None:
    """Those that come when the connection is just there are the ones that could pass."""
    for _ in range(6):
        sender = await open_layer()
        caller = Caller(sender, receiver.channel)
        first = caller.call()
        await caller.call_each_turn_until(first.done)
        heard = await receiver.hear(len(caller.tasks))
        assert heard == list(range(len(caller.tasks)))
        await asyncio.gather(*caller.tasks)


async def test_in_each_turn_of_the_loop_while_it_reconnects(
    open_layer: OpenLayer, broker: Broker, receiver: Receiver
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        sender = await open_layer(host=proxy.url)
        await sender.connect()
        caller = Caller(sender, receiver.channel)
        proxy.cut()
        await proxy.until(lambda: not proxy.named("publisher"))
        first = caller.call()
        await caller.call_each_turn_until(first.done)
        assert await receiver.hear(len(caller.tasks)) == list(range(len(caller.tasks)))
        await asyncio.gather(*caller.tasks)


async def test_in_each_turn_of_the_loop_while_there_is_no_room(
    open_layer: OpenLayer, broker: Broker, receiver: Receiver
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        sender = await open_layer(host=proxy.url)
        await sender.connect()
        caller = Caller(sender, receiver.channel, body=b"x" * 2**20)
        proxy.stall(TO_BROKER)
        await caller.call_each_turn_until(lambda: len(caller.tasks) == 60)
        proxy.resume()
        last = caller.tasks[-1]
        caller._body = b""
        await caller.call_each_turn_until(last.done)
        assert await receiver.hear(len(caller.tasks)) == list(range(len(caller.tasks)))
        await asyncio.gather(*caller.tasks)


async def test_of_sync_code_too(open_layer: OpenLayer, receiver: Receiver) -> None:
    """In the order in which the calls arrive at the loop that serves them."""
    layer = await open_layer()
    caller = Caller(layer, receiver.channel)

    async def call() -> None:
        first = caller.call()
        await caller.call_each_turn_until(first.done)
        await asyncio.gather(*caller.tasks)
        await layer.close()

    await asyncio.to_thread(async_to_sync(call))
    assert await receiver.hear(len(caller.tasks)) == list(range(len(caller.tasks)))


class Behind:
    """A layer, behind a proxy, whose calls have something of their own to wait for."""

    def __init__(self, layer: RabbitmqChannelLayer, proxy: AmqpProxy) -> None:
        self.layer = layer
        self.proxy = proxy
        self.published: list[str] = []  # routing keys, as the broker saw them
        proxy.rule(TO_BROKER, commands.Basic.Publish, self._note)

    def _note(self, frame: Frame) -> Frame:
        key = frame.decode().routing_key
        if key not in ("!ping", "!all"):  # What the layer says itself doesn't count.
            self.published.append(key)
        return frame

    def call(self, *groups: str) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.layer.group_send(group, {})) for group in groups]

    def call_own(self, channel: str) -> asyncio.Task[None]:
        return asyncio.create_task(self.layer.send(channel, {}))

    def key(self, channel: str) -> str:
        return channel.partition("!")[0] + "!"

    async def publisher_connected(self) -> None:
        supervisor = publisher_of(self.layer).supervisor
        await supervisor.wait_ready(asyncio.get_running_loop().time() + 10)


@pytest.fixture
async def behind(
    open_layer: OpenLayer, broker: Broker
) -> AsyncIterator[Callable[..., Awaitable[Behind]]]:
    async with AmqpProxy(broker.url) as proxy:

        async def make(**config: Any) -> Behind:
            return Behind(await open_layer(host=proxy.url, **config), proxy)

        yield make


async def test_behind_a_group_that_is_not_bound_yet(
    behind: Callable[..., Awaitable[Behind]],
) -> None:
    at = await behind()
    channel = await at.layer.new_channel()
    await at.layer.group_add(GROUP, channel)
    await at.layer.connect()
    bound = at.proxy.hold(TO_BROKER, commands.Exchange.Bind, name="subscriber")
    at.proxy.cut(name="subscriber")
    await at.proxy.until(lambda: not at.proxy.named("subscriber"))
    calls = at.call(GROUP)
    calls.append(at.call_own(channel))
    calls += at.call("a")
    done, _ = await asyncio.wait(calls, timeout=0.05)
    calls += at.call("b")
    assert not done
    assert at.published == []
    bound.set()
    await asyncio.gather(*calls)
    assert at.published == [GROUP, at.key(channel), "a", "b"]


async def test_behind_a_queue_of_their_own_that_is_not_there_yet(
    behind: Callable[..., Awaitable[Behind]],
) -> None:
    at = await behind()
    declared = at.proxy.hold(TO_CLIENT, commands.Queue.DeclareOk)
    channel = await at.layer.new_channel()
    own = at.call_own(channel)
    calls = at.call("a", "b")
    await at.publisher_connected()
    calls += at.call("c")
    assert at.published == []
    declared.set()
    await asyncio.gather(own, *calls)
    assert at.published == [at.key(channel), "a", "b", "c"]


async def test_a_call_that_waits_in_vain_leaves_the_others_the_time_to_be_sent(
    behind: Callable[..., Awaitable[Behind]],
) -> None:
    at = await behind(operation_timeout=2)
    at.proxy.hold(TO_CLIENT, commands.Queue.DeclareOk)
    own = at.call_own(await at.layer.new_channel())
    calls = at.call("a", "b")
    with pytest.raises(BrokerUnavailable):
        await own
    await asyncio.gather(*calls)
    assert at.published == ["a", "b"]
    assert at.layer.statistics()[0].counters.confirmed == 2


async def test_a_cancelled_call_lets_the_others_go_on(
    behind: Callable[..., Awaitable[Behind]],
) -> None:
    at = await behind()
    at.proxy.hold(TO_CLIENT, commands.Queue.DeclareOk)
    own = at.call_own(await at.layer.new_channel())
    calls = at.call("a", "b", "c")
    await at.publisher_connected()
    calls[1].cancel()
    own.cancel()
    await asyncio.gather(calls[0], calls[2])
    assert at.published == ["a", "c"]
    statistics = at.layer.statistics()[0]
    assert (statistics.counters.published, statistics.counters.cancelled) == (2, 0)


async def test_a_call_that_waits_when_publishers_are_blocked_hears_it_at_once(
    behind: Callable[..., Awaitable[Behind]],
) -> None:
    at = await behind()
    at.proxy.hold(TO_CLIENT, commands.Queue.DeclareOk)
    own = at.call_own(await at.layer.new_channel())
    calls = at.call("a", "b")
    await at.publisher_connected()
    at.proxy.inject(commands.Connection.Blocked("low on tests"), name="publisher")
    await asyncio.gather(*calls)
    assert at.layer.statistics()[0].counters.blocked_groups == 2
    assert at.published == []
    own.cancel()
    await asyncio.wait([own])
