"""The groups' bindings outlive the queue of a lost connection, for a while, and then they go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pamqp.commands
import pika  # type: ignore[import-untyped]  # has no annotations
import pytest

from channels_rabbitmq._broker import topology as _topology
from channels_rabbitmq._identity import id_of
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy, Frame
from tests.support.declared import exchanges, group_bindings, queues, until_expired
from tests.support.layers import statistics_of
from tests.support.log_lines import log_lines
from tests.support.members import GROUP, open_member
from tools.private_broker import PrivateBroker

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}


def queues_of(connection: str) -> set[str]:
    """The queues that one connection of a process has declared for itself."""
    return {f"{connection}{end}" for end in ("", ".lease", ".requests")}


def exchanges_of(connection: str) -> set[str]:
    """The exchanges that one connection of a process has declared for itself."""
    return {f"{connection}{end}" for end in ("", ".groups", ".lease", ".members")}


async def reconnect(proxy: AmqpProxy) -> None:
    with log_lines() as lines:
        proxy.cut(name="subscriber")
        await lines.next("WARNING subscriber .*: connected again")


@pytest.fixture
async def proxy(private_broker: PrivateBroker) -> Any:
    async with AmqpProxy(private_broker.url) as proxy:
        yield proxy


@pytest.mark.slow
async def test_groups_of_a_lost_connection_stay_bound_until_the_lease_is_over(
    open_layer: OpenLayer,
    private_broker: PrivateBroker,
    proxy: AmqpProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So long that the lists below are read meanwhile.
    monkeypatch.setattr(_topology, "LEASE", 5.0)
    layer, channel = await open_member(open_layer, host=proxy.url)
    id_ = id_of(channel)
    await reconnect(proxy)
    await layer.group_add(GROUP, channel)
    # The queue itself has gone at once.
    assert set(await queues(private_broker)) == {f"{id_}.1.lease", *queues_of(f"{id_}.2")}
    assert await group_bindings(private_broker, GROUP) == [f"{id_}.1.groups", f"{id_}.2.groups"]
    await layer.group_send(GROUP, MESSAGE)
    await layer.send(channel, MESSAGE)
    assert [await layer.receive(channel) for _ in range(2)] == [MESSAGE] * 2
    await until_expired(private_broker, f"{id_}.1.lease")
    assert await group_bindings(private_broker, GROUP) == [f"{id_}.2.groups"]
    assert await exchanges(private_broker) == exchanges_of(f"{id_}.2")
    await layer.group_send(GROUP, MESSAGE)
    assert await layer.receive(channel) == MESSAGE
    # What has a consumer doesn't expire, and nothing was ever routed to it.
    lease = (await queues(private_broker))[f"{id_}.2.lease"]
    assert (lease["consumers"], lease["messages"]) == (1, 0)


@pytest.mark.slow
async def test_they_stay_as_long_as_it_takes_to_bind_them_anew(
    open_layer: OpenLayer,
    private_broker: PrivateBroker,
    proxy: AmqpProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_topology, "LEASE", 1.0)
    layer, channel = await open_member(open_layer, host=proxy.url)
    id_ = id_of(channel)

    bound = asyncio.Event()

    async def slowly(frame: Frame) -> Frame:
        if frame.decode().routing_key == GROUP:
            await bound.wait()
        return frame

    proxy.rule(TO_BROKER, pamqp.commands.Exchange.Bind, slowly)
    await reconnect(proxy)
    await until_expired(private_broker, f"{id_}.1.lease")
    assert await group_bindings(private_broker, GROUP) == [f"{id_}.1.groups"]
    bound.set()
    await layer.group_add(GROUP, channel)
    # The exchange is deleted in a moment, and nobody is told.
    while await group_bindings(private_broker, GROUP) != [f"{id_}.2.groups"]:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    assert await exchanges(private_broker) == exchanges_of(f"{id_}.2")
    await layer.group_send(GROUP, MESSAGE)
    assert await layer.receive(channel) == MESSAGE


@pytest.mark.slow
async def test_nothing_stays_of_a_process_that_was_killed(
    open_layer: OpenLayer,
    private_broker: PrivateBroker,
    proxy: AmqpProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_topology, "LEASE", 1.0)
    _layer, channel = await open_member(open_layer, host=proxy.url)
    id_ = id_of(channel)
    proxy.refuse()
    proxy.cut(name="subscriber")
    await until_expired(private_broker, f"{id_}.1.lease")
    assert await queues(private_broker) == {}
    assert await exchanges(private_broker) == set()
    assert await group_bindings(private_broker, GROUP) == []


async def test_closing_leaves_nothing_of_former_connections_either(
    open_layer: OpenLayer, private_broker: PrivateBroker, proxy: AmqpProxy
) -> None:
    layer = await open_layer(host=proxy.url)
    channel = await layer.new_channel()
    for _ in range(3):
        await layer.group_add(GROUP, channel)
        await reconnect(proxy)
    assert len(await queues(private_broker)) >= 3
    await layer.close()
    assert await queues(private_broker) == {}
    assert await exchanges(private_broker) == set()


async def test_a_lease_deleted_by_hand_is_not_missed(
    open_layer: OpenLayer, private_broker: PrivateBroker, proxy: AmqpProxy
) -> None:
    """Or by a node of a cluster that ends: brokers may be told to put queues on any node."""
    layer, channel = await open_member(open_layer, host=proxy.url)
    id_ = id_of(channel)
    lease = f"{id_}.1.lease"
    await asyncio.to_thread(private_broker.ctl, "delete_queue", lease)
    await proxy.seen(TO_CLIENT, pamqp.commands.Basic.Cancel)
    await layer.group_send(GROUP, MESSAGE)
    await layer.send(channel, MESSAGE)
    assert [await layer.receive(channel) for _ in range(2)] == [MESSAGE] * 2
    assert proxy.opened == 2
    await layer.close()
    assert await exchanges(private_broker) == set()


async def test_what_somebody_puts_into_a_lease_harms_nothing(
    open_layer: OpenLayer, private_broker: PrivateBroker, proxy: AmqpProxy
) -> None:
    layer, channel = await open_member(open_layer, host=proxy.url)
    id_ = id_of(channel)
    connection = await layer.carehare_connection
    for _ in range(3):
        await connection.publish(b"stray", routing_key=f"{id_}.1.lease")
    await proxy.seen(TO_CLIENT, pamqp.commands.Basic.Deliver)
    await layer.group_send(GROUP, MESSAGE)
    assert await layer.receive(channel) == MESSAGE
    # Nobody looks at it: it would say that something arrives from the queue of messages.
    counters = statistics_of(layer).counters
    assert (counters.delivered, counters.malformed) == (1, 0)
    await layer.send(channel, MESSAGE)
    assert await layer.receive(channel) == MESSAGE
    assert proxy.opened == 3


async def test_a_process_that_reconnects_again_and_again_has_two_leases_at_most(
    open_layer: OpenLayer, private_broker: PrivateBroker, proxy: AmqpProxy
) -> None:
    layer = await open_layer(host=proxy.url)
    channel = await layer.new_channel()
    for _ in range(4):
        await layer.group_add(GROUP, channel)
        await reconnect(proxy)
    await layer.group_add(GROUP, channel)
    id_ = id_of(channel)
    # The rest is deleted in a moment: the broker was told without being asked for an answer.
    two = {f"{id_}.4.lease", *queues_of(f"{id_}.5")}
    while set(await queues(private_broker)) != two:  # noqa: ASYNC110 - the broker tells nobody
        await asyncio.sleep(0.05)
    # The fourth connection may have been cut while it held the third one's.
    bound = set(await group_bindings(private_broker, GROUP))
    assert bound - {f"{id_}.3.groups"} == {f"{id_}.4.groups", f"{id_}.5.groups"}
    await layer.group_send(GROUP, MESSAGE)
    assert await layer.receive(channel) == MESSAGE


def remove_way(url: str, own: str, way: str) -> None:
    """As somebody else would who may do everything."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        amqp_channel = connection.channel()
        if way == "exchange":
            amqp_channel.exchange_delete(f"{own}.groups")
        else:
            amqp_channel.exchange_unbind(f"{own}.members", f"{own}.groups")


@pytest.mark.parametrize("way", ["exchange", "binding"])
async def test_a_way_for_all_groups_that_is_gone_is_found_by_the_probe(
    open_layer: OpenLayer,
    private_broker: PrivateBroker,
    way: str,
) -> None:
    layer, channel = await open_member(open_layer, host=private_broker.url, watchdog_interval=0.2)
    own = f"{id_of(channel)}.1"
    with log_lines() as lines:
        await asyncio.to_thread(remove_way, private_broker.url, own, way)
        await lines.next("WARNING subscriber .*: lost .* a binding of the queue is gone")
        await lines.next("WARNING subscriber .*: connected again")
    await layer.group_add(GROUP, channel)
    await layer.group_send(GROUP, MESSAGE)
    assert await layer.receive(channel) == MESSAGE
