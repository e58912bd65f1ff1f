"""Queues, exchanges and bindings: what the broker is told, and what a reconnect makes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pamqp.commands
import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy, Frame
from tests.support.brokers import Broker
from tests.support.layers import (
    inside,
    reconnect_subscriber,
    set_linger,
    statistics_of,
    subscriber_of,
)
from tests.support.log_lines import log_lines

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}
commands = pamqp.commands


class Told:
    """What the broker was told through a proxy: methods, in order."""

    def __init__(self, proxy: AmqpProxy, *kinds: type) -> None:
        self.methods: list[Any] = []
        for kind in kinds:
            proxy.rule(TO_BROKER, kind, self._note)

    def _note(self, frame: Frame) -> Frame:
        self.methods.append(frame.decode())
        return frame

    def of(self, kind: type) -> list[Any]:
        return [method for method in self.methods if isinstance(method, kind)]


async def connected(layer: RabbitmqChannelLayer) -> None:
    await subscriber_of(layer).supervisor.wait_ready(asyncio.get_running_loop().time() + 10)


async def reconnect(layer: RabbitmqChannelLayer) -> None:
    await connected(layer)  # Messages may come before that.
    with log_lines() as lines:
        reconnect_subscriber(layer)
        await lines.next("WARNING subscriber .*: lost .*: for a test")
        await lines.next("WARNING subscriber .*: connected again")


async def test_the_queue_and_the_private_exchange(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        told = Told(
            proxy,
            commands.Queue.Declare,
            commands.Queue.Bind,
            commands.Exchange.Declare,
            commands.Exchange.Bind,
            commands.Exchange.Unbind,
            commands.Basic.Qos,
            commands.Basic.Consume,
        )
        layer = await open_layer(host=proxy.url, local_capacity=7, remote_capacity=8, expiry=1.5)
        id_ = (await layer.new_channel()).partition("!")[0]
        await connected(layer)
        queue, requests, lease = told.of(commands.Queue.Declare)
        assert (queue.queue, queue.exclusive, queue.durable) == (id_, True, False)
        assert queue.arguments == {
            "x-queue-type": "classic",
            "x-max-length": 8,
            "x-max-length-bytes": 32 * 1024 * 1024,
            "x-overflow": "reject-publish",
            "x-message-ttl": 1500,
        }
        assert (requests.queue, requests.exclusive) == (f"{id_}.1.requests", True)
        assert requests.arguments == {
            "x-queue-type": "classic",
            "x-max-length": 1000,
            "x-max-length-bytes": 32 * 1024 * 1024,
            "x-overflow": "drop-head",
            "x-message-ttl": 5000,
        }
        requests_binds = [
            (each.exchange, each.routing_key)
            for each in told.of(commands.Queue.Bind)
            if each.queue == requests.queue
        ]
        assert requests_binds == [(groups_exchange, "!all"), (groups_exchange, f"{id_}!requests")]
        # Newer brokers may refuse a queue that is neither exclusive nor durable.
        assert (lease.queue, lease.exclusive, lease.durable) == (f"{id_}.1.lease", False, True)
        version = subscriber_of(layer).supervisor.connection.server_version
        assert (3, 10) <= version < (9,)
        # On the node of the other queue: older versions have no such argument, and don't need it.
        place = {"x-queue-leader-locator": "client-local"} if version >= (4, 0) else {}
        assert lease.arguments == {"x-queue-type": "classic", "x-expires": 20_000, **place}
        _, *private = told.of(commands.Exchange.Declare)
        assert [(each.exchange, each.exchange_type) for each in private] == [
            (f"{id_}.1", "direct"),
            (f"{id_}.1.members", "fanout"),
            (f"{id_}.1.groups", "fanout"),
            (f"{id_}.1.lease", "direct"),
        ]
        assert all(each.auto_delete and not each.durable for each in private)
        *_, bind = told.of(commands.Exchange.Bind)
        assert (bind.source, bind.destination, bind.routing_key) == (
            groups_exchange,
            f"{id_}.1",
            f"{id_}!",
        )
        qos = [(each.prefetch_count, each.global_) for each in told.of(commands.Basic.Qos)]
        assert qos == [(7, False), (100, False)]
        # With Khepri, bindings that have arguments break the routing of direct exchanges.
        await layer.group_add("g", f"{id_}!x")
        binds = [*told.of(commands.Queue.Bind), *told.of(commands.Exchange.Bind)]
        assert (binds[-1].destination, binds[-1].routing_key) == (f"{id_}.1.groups", "g")
        assert not any(bind.arguments for bind in binds)

        told.methods.clear()
        await reconnect(layer)
        assert [each.queue for each in told.of(commands.Queue.Declare)] == [
            f"{id_}.2",
            f"{id_}.2.requests",
            f"{id_}.2.lease",
        ]
        # The former exchange goes before the new one is bound: no message goes to both.
        kinds = [type(method) for method in told.methods]
        unbound_at = kinds.index(commands.Exchange.Unbind)
        binds = [
            at
            for at, method in enumerate(told.methods)
            if isinstance(method, commands.Exchange.Bind) and method.destination == f"{id_}.2"
        ]
        assert unbound_at < binds[0]
        ways = [(each.source, each.routing_key) for each in told.of(commands.Exchange.Unbind)]
        assert ways == [
            (groups_exchange, f"{id_}!"),
            (f"{id_}.1.groups", ""),
            (groups_exchange, f"{id_}!alive"),
        ]
        destinations = [each.destination for each in told.of(commands.Exchange.Unbind)]
        assert destinations == [f"{id_}.1", f"{id_}.1.members", f"{id_}.1.lease"]


async def test_no_limits_are_no_arguments(open_layer: OpenLayer, broker: Broker) -> None:
    async with AmqpProxy(broker.url) as proxy:
        told = Told(proxy, commands.Queue.Declare)
        layer = await open_layer(
            host=proxy.url, remote_capacity=None, remote_capacity_bytes=None, expiry=None
        )
        await layer.new_channel()
        await connected(layer)
        assert told.methods[0].arguments == {
            "x-queue-type": "classic",
            "x-overflow": "reject-publish",
        }


async def test_a_page_reload_costs_the_broker_nothing(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        binds = proxy.count(TO_BROKER, commands.Exchange.Bind)
        for _ in range(10):
            await layer.group_discard("g", channel)
            await layer.group_add("g", channel)
        await layer.group_send("g", MESSAGE)
        assert await layer.receive(channel) == MESSAGE
        assert proxy.count(TO_BROKER, commands.Exchange.Bind) == binds
        assert proxy.count(TO_BROKER, commands.Exchange.Unbind) == 0


async def test_a_group_that_nobody_wants_any_more_is_unbound_after_its_linger(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        bindings = inside(layer).bindings
        set_linger(layer, 60.0)
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        await layer.group_discard("g", channel)
        await layer.group_send("g", MESSAGE)  # lingering: arrives, and nobody wants it
        await layer.send(channel, {"n": 1})
        assert await layer.receive(channel) == {"n": 1}
        assert statistics_of(layer).counters.no_members == 1
        assert proxy.count(TO_BROKER, commands.Exchange.Unbind) == 0
        # The next one to go lingers for no time at all, and the first one's time is over as well.
        bindings._groups["g"].lingers_until = 0.0
        set_linger(layer, 0.0)
        await layer.group_add("g2", channel)
        await layer.group_discard("g2", channel)
        await proxy.seen(TO_CLIENT, commands.Exchange.UnbindOk, 2)
        assert (bindings.bound, bindings.lingering) == (0, 0)


async def test_one_refused_bind_is_told_and_does_not_stop_the_rest(
    open_layer: OpenLayer, broker: Broker
) -> None:
    def bind_to_the_default_exchange(frame: Frame) -> Any:
        bind = frame.decode()
        if bind.routing_key == "g7":
            bind.destination = ""  # 403 ACCESS_REFUSED
        return bind

    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        await asyncio.gather(*(layer.group_add(f"g{n}", channel) for n in range(20)))
        rule = proxy.rule(TO_BROKER, commands.Exchange.Bind, bind_to_the_default_exchange)
        with log_lines() as lines:
            await reconnect(layer)
            await asyncio.gather(*(layer.group_add(f"g{n}", channel) for n in range(20) if n != 7))
            with pytest.raises(BrokerUnavailable, match=r"'g7': .* 403 ACCESS_REFUSED"):
                await layer.group_add("g7", channel)
            await lines.next("ERROR subscriber .*: RabbitMQ refused to bind the group 'g7': .* 403")
        # It was a member before, so it still is; and the next attempt works.
        proxy.remove(rule)
        await layer.group_add("g7", channel)
        await layer.group_send("g7", MESSAGE)
        assert await layer.receive(channel) == MESSAGE


@pytest.mark.slow
async def test_more_groups_than_amqp_channels_come_back(open_layer: OpenLayer) -> None:
    """There are 2,047; 4.x took one for each group, and was dead for good after a reconnect."""
    layer = await open_layer()
    channel = await layer.new_channel()
    groups = [f"g{n}" for n in range(2100)]
    await asyncio.gather(*(layer.group_add(group, channel) for group in groups))
    await reconnect(layer)
    assert statistics_of(layer).groups.bound < len(groups)
    await asyncio.gather(*(layer.group_add(group, channel) for group in groups))
    assert statistics_of(layer).groups.bound == len(groups)
    for group in (groups[0], groups[-1]):
        await layer.group_send(group, {"group": group})
        assert await layer.receive(channel) == {"group": group}


async def test_a_bind_that_is_not_confirmed_ends_the_call_in_time(
    open_layer: OpenLayer, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a cluster with Khepri that has lost its majority: it takes no bindings then."""
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        loop_layer: Any = inside(layer)
        channel = await layer.new_channel()
        await layer.group_add("before", channel)
        released = proxy.hold(TO_CLIENT, commands.Exchange.BindOk, times=1)
        with monkeypatch.context() as patch:
            # Only this call has so little time: the others may run on a slow machine.
            patch.setattr(loop_layer, "_deadline", lambda: loop_layer.loop.time() + 0.1)
            with pytest.raises(BrokerUnavailable, match=r"'g' was not bound .* did not confirm"):
                await layer.group_add("g", channel)
        assert not loop_layer.members.has_members("g")
        released.set()
        await layer.group_add("g", channel)
        for group in ("before", "g"):
            await layer.group_send(group, {"group": group})
            assert await layer.receive(channel) == {"group": group}


@pytest.mark.slow
async def test_a_dead_queue_that_lingers_has_no_say_in_what_the_new_one_takes(
    open_layer: OpenLayer, broker: Broker
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        sender = await open_layer()
        receiver = await open_layer(host=proxy.url, remote_capacity=2, local_capacity=2)
        await receiver.connect()  # Messages may come before that.
        channel = await receiver.new_channel()
        await sender.send(channel, MESSAGE)
        assert await receiver.receive(channel) == MESSAGE
        # Half-open: what either side says on the former connection gets stuck on its way.
        (former,) = proxy.named("subscriber")
        released = asyncio.Event()

        async def get_stuck(frame: Frame) -> Frame:
            if frame.link is former:
                await released.wait()
            return frame

        proxy.rule(TO_BROKER, object, get_stuck)
        proxy.rule(TO_CLIENT, object, get_stuck)
        await reconnect(receiver)
        for n in range(50):
            await sender.send(channel, {"n": n})
            assert await receiver.receive(channel) == {"n": n}
        assert former in proxy.links
        released.set()


async def test_a_former_connections_deliveries_do_not_count_on_the_next(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        sender = await open_layer()
        # The goodbye is held up, so the broker goes on delivering for a moment.
        released = proxy.hold(TO_BROKER, commands.Connection.Close, name="subscriber")
        reconnect_subscriber(layer)
        await asyncio.sleep(0)  # lets it do so
        await sender.group_send("g", MESSAGE)
        await proxy.seen(TO_CLIENT, commands.Basic.Deliver)
        await connected(layer)
        assert statistics_of(layer).unacked == 0
        released.set()
