"""A nack says "full" or "gone": receivers that are full, that end, and that vanish with a node."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq._broker import receivers as _receivers
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import broker_commands
from tests.support.layers import reconnect_subscriber, statistics_of
from tests.support.lengths import Length
from tests.support.log_lines import log_lines
from tests.support.private_cluster import PrivateCluster

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}

# How often a process ends while others send to it.
_ENDS = Length(full=8, brief=2)


async def outcome(layer: RabbitmqChannelLayer, channel: str, message: object = None) -> str:
    try:
        await layer.send(channel, {"n": message})
    except ChannelFull:
        return "full"
    return "sent"


def published(layer: RabbitmqChannelLayer) -> int:
    return statistics_of(layer).counters.published


@pytest.mark.slow
async def test_sends_to_a_process_that_ends_find_no_full_queue(open_layer: OpenLayer) -> None:
    for _ in range(_ENDS.count):
        sender, receiver = await open_layer(), await open_layer()
        channel = await receiver.new_channel()
        await sender.send(channel, MESSAGE)
        sending = []
        for number in range(300):
            sending.append(asyncio.create_task(outcome(sender, channel)))
            if number == 150:
                closing = asyncio.create_task(receiver.close())
            await asyncio.sleep(0.0002)
        assert Counter(await asyncio.gather(*sending)) == {"sent": 300}
        await closing
        # Afterwards, too, it is gone and not full.
        assert await outcome(sender, channel) == "sent"
        (statistics,) = sender.statistics()
        assert statistics.counters.nacked == 0
        assert statistics.counters.unreachable > 0


async def test_sends_to_a_process_that_reconnects_arrive(open_layer: OpenLayer) -> None:
    sender, receiver = await open_layer(), await open_layer()
    await receiver.connect()  # Messages may come before that.
    channel = await receiver.new_channel()
    await sender.send(channel, {"n": -1})
    assert await receiver.receive(channel) == {"n": -1}
    with log_lines() as lines:
        reconnect_subscriber(receiver)
        sending = []
        for number in range(100):
            sending.append(asyncio.create_task(outcome(sender, channel, number)))
            await asyncio.sleep(0.0005)
        await lines.next("WARNING subscriber .*: connected again")
    assert Counter(await asyncio.gather(*sending)) == {"sent": 100}
    # Those that the old queue took are lost with it; none comes twice.
    await sender.send(channel, {"n": 100})
    arrived = []
    while 100 not in arrived:
        arrived.append((await receiver.receive(channel))["n"])
    assert arrived[-50:] == list(range(51, 101))
    assert len(set(arrived)) == len(arrived)


async def test_a_full_queue_is_told_soon_and_the_next_times_at_once(open_layer: OpenLayer) -> None:
    receiver = await open_layer(local_capacity=1, remote_capacity=10)
    sender = await open_layer()
    channel = await receiver.new_channel()
    sent = 0
    while await outcome(sender, channel, sent) == "sent":
        sent += 1
    tries = []
    for _ in range(200):
        before = published(sender)
        assert await outcome(sender, channel) == "full"
        tries.append(published(sender) - before)
    # But for one in a second, which tries again and asks. The machine may be busy.
    assert tries.count(1) > 150
    for number in range(sent):
        assert await receiver.receive(channel) == {"n": number}
    await sender.send(channel, MESSAGE)
    assert await receiver.receive(channel) == MESSAGE


async def test_a_full_queue_of_a_process_that_has_reconnected(open_layer: OpenLayer) -> None:
    """The question goes to its present connection."""
    receiver = await open_layer(local_capacity=1, remote_capacity=2)
    sender = await open_layer()
    channel = await receiver.new_channel()
    await asyncio.gather(sender.connect(), receiver.connect())
    for _ in range(2):
        with log_lines() as lines:
            reconnect_subscriber(receiver)
            await lines.next("WARNING subscriber .*: connected again")
    outcomes = Counter([await outcome(sender, channel) for _ in range(20)])
    assert outcomes["full"] >= 20 - 4
    assert sender.statistics()[0].counters.unreachable == 0


# In a cluster


@pytest.fixture(scope="module")
def cluster(rabbitmq: None) -> Iterator[PrivateCluster]:
    with PrivateCluster(broker_commands()) as cluster:
        if (4, 0) <= cluster.version < (4, 3):
            cluster.use_khepri()
        for node in cluster.nodes:  # Queues go anywhere, unless they say something else.
            node.ctl("eval", 'application:set_env(rabbit, queue_leader_locator, <<"balanced">>).')
        yield cluster


@pytest.fixture
def room_for_a_lease(cluster: PrivateCluster, request: pytest.FixtureRequest) -> Iterator[bool]:
    """Without it a process has room for its other two queues."""
    if not request.param:
        cluster.nodes[0].ctl("set_vhost_limits", "-p", "/", '{"max-queues": 2}')
    yield request.param
    if not request.param:
        cluster.nodes[0].ctl("clear_vhost_limits", "-p", "/")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("room_for_a_lease", [True, False], indirect=True)
async def test_a_process_that_vanishes_with_its_node_is_gone_and_not_full(
    open_layer: OpenLayer,
    cluster: PrivateCluster,
    monkeypatch: pytest.MonkeyPatch,
    room_for_a_lease: bool,
) -> None:
    monkeypatch.setattr(_receivers, "UNREACHABLE_TIMEOUT", 3.0)
    node = cluster.nodes[1]
    sender = await open_layer(host=cluster.nodes[0].url)
    receiver = await open_layer(host=node.url)
    with log_lines() as lines:
        channel = await receiver.new_channel()
        await receiver.group_add("g", channel)
        without = [line for line in lines.rest() if "goes without a lease" in line]
        assert bool(without) is not room_for_a_lease
    await sender.send(channel, MESSAGE)
    assert await receiver.receive(channel) == MESSAGE
    with log_lines() as lines:
        try:
            await asyncio.to_thread(node.kill)
            killed_at = time.monotonic()
            took = []
            while time.monotonic() - killed_at < 8.0:
                tried_at = time.monotonic()
                assert await outcome(sender, channel) == "sent"
                took.append(time.monotonic() - tried_at)
                await sender.group_send("g", MESSAGE)
                await asyncio.sleep(0.02)
        finally:
            await asyncio.to_thread(node.start)
            await asyncio.to_thread(cluster.wait_complete, node)
        # Tries for two seconds, and no more than that each time it is found out anew.
        assert max(took) < 4.0
        (statistics,) = sender.statistics()
        assert statistics.counters.nacked == 0
        assert statistics.counters.unreachable > len(took) / 2
        so_far = lines.rest()
        assert [line for line in so_far if "full" in line] == []
        assert [line for line in so_far if "the process of their channel is gone" in line] != []
        if not [line for line in so_far if "connected again" in line]:
            await lines.next("WARNING subscriber .*: connected again")
    await sender.send(channel, {"n": "again"})
    while await receiver.receive(channel) != {"n": "again"}:
        pass
