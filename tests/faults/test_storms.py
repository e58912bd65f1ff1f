"""Very many calls at once, cancelled, contradicting each other, with connections lost meanwhile."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from channels_rabbitmq._broker.topology import groups_probe_key
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.layers import inside, publisher_of
from tests.support.lengths import Length
from tests.support.log_lines import LogLines
from tests.support.remains import pending_futures, remains, until_nothing_remains
from tools.private_broker import PrivateBroker

pytestmark = pytest.mark.slow

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

_CANCELLED_CALLS = Length(full=100_000, brief=6_000)
_CALLS_LEFT_ALONE = Length(full=1_000, brief=300)
_JOINS_AND_LEAVES = Length(full=60.0, brief=4.0)

_AT_ONCE = 100  # calls

logger = logging.getLogger(__name__)  # of figures: pytest -o log_cli=1 --log-cli-level=INFO


async def bound_groups(
    broker: PrivateBroker, exchange: str, layer: RabbitmqChannelLayer
) -> set[str]:
    """What the broker says of the layer's present connection."""
    loop_layer: Any = inside(layer)
    topology = loop_layer.subscriber._topology
    own = topology.own_groups_exchange
    rows = await asyncio.to_thread(broker.list_bindings)
    # The way from there to the queue.
    ways = {row["destination_name"] for row in rows if row["source_name"] == own}
    assert ways == {f"{topology.direct_exchange}.members", topology.lease_queue}
    return {
        row["routing_key"]
        for row in rows
        if row["source_name"] == exchange and row["destination_name"] == own
    } - {groups_probe_key(loop_layer.id)}


# Cancellation


class CancellationStorm:
    """Numbered messages between two layers; of all that happens there are books.

    The *wild* channels are members of wild groups now and then; the *tame* ones stay where they
    are. Each channel has a reader who is never cancelled, beside the calls of the storm which are.
    """

    WILD = 20  # channels, and groups

    def __init__(
        self, sender: RabbitmqChannelLayer, receiver: RabbitmqChannelLayer, seed: int
    ) -> None:
        self.sender = sender
        self.receiver = receiver
        self.chance = random.Random(seed)
        self.number = 0
        self.cancelled: Counter[str] = Counter()  # calls that ended so, by kind
        self.received: dict[str, Counter[int]] = defaultdict(Counter)  # by channel
        self.due: dict[str, set[int]] = defaultdict(set)  # what each channel must receive
        self.groups = [f"wild{n}" for n in range(self.WILD)]

    async def prepare(self) -> None:
        self.wild = [await self.receiver.new_channel() for _ in range(self.WILD)]
        self.tame = [await self.receiver.new_channel() for _ in range(5)]
        for channel in self.tame:
            await self.receiver.group_add("tame", channel)
        self.readers = [
            asyncio.create_task(self.read(channel)) for channel in (*self.wild, *self.tame)
        ]

    async def read(self, channel: str) -> None:
        while True:
            await self.receive(channel)

    async def receive(self, channel: str) -> None:
        message = await self.receiver.receive(channel)
        self.received[channel][message["number"]] += 1

    def next_message(self) -> dict[str, Any]:
        self.number += 1
        return {"type": "storm", "number": self.number}

    async def send(self, channel: str) -> None:
        message = self.next_message()
        await self.sender.send(channel, message)
        self.due[channel].add(message["number"])

    async def group_send(self, group: str, members: list[str]) -> None:
        message = self.next_message()
        await self.sender.group_send(group, message)
        for channel in members:
            self.due[channel].add(message["number"])

    async def add_hear_discard(self) -> None:
        """None of these is cancelled: a group, which others join and leave, must be heard."""
        group, channel = self.chance.choice(self.groups), await self.receiver.new_channel()
        await self.receiver.group_add(group, channel)
        await self.group_send(group, [channel])
        while self.due[channel] - self.received[channel].keys():
            await asyncio.wait_for(self.receive(channel), 20)  # also what others send to the group
        await self.receiver.group_discard(group, channel)
        # What has arrived before it left
        while (message := inside(self.receiver).router.receive_nowait(channel)) is not None:
            self.received[channel][message["number"]] += 1

    def wild_call(self) -> tuple[str, Any]:
        channel, group = self.chance.choice(self.wild), self.chance.choice(self.groups)
        kind = self.chance.choice(["send", "group_send", "group_add", "group_discard", "receive"])
        calls: dict[str, Callable[[], Any]] = {
            "send": lambda: self.send(channel),
            "group_send": lambda: self.group_send(group, []),
            "group_add": lambda: self.receiver.group_add(group, channel),
            "group_discard": lambda: self.receiver.group_discard(group, channel),
            "receive": lambda: self.receive(channel),
        }
        return kind, calls[kind]()

    def tame_call(self) -> Any:
        which = self.chance.randrange(3)
        if which == 0:
            return self.send(self.chance.choice(self.tame))
        if which == 1:
            return self.group_send("tame", self.tame)
        return self.add_hear_discard()

    async def cancel_at_some_moment(self) -> None:
        kind, call = self.wild_call()
        task = asyncio.create_task(call)
        if self.chance.random() < 0.5:
            for _ in range(self.chance.randrange(5)):
                await asyncio.sleep(0)  # so that it has come to one point or another
        else:
            await asyncio.sleep(self.chance.uniform(0, 0.005))
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            self.cancelled[kind] += 1
        else:
            task.result()

    async def run(self, cancelled: int, left_alone: int) -> None:
        calls = [True] * cancelled + [False] * left_alone
        self.chance.shuffle(calls)
        room = asyncio.Semaphore(_AT_ONCE)

        async def make(is_cancelled: bool) -> None:
            try:
                await (self.cancel_at_some_moment() if is_cancelled else self.tame_call())
            finally:
                room.release()

        tasks = set()
        for is_cancelled in calls:
            await room.acquire()
            task = asyncio.create_task(make(is_cancelled))
            tasks.add(task)
            task.add_done_callback(lambda task: tasks.discard(task) or task.result())
        while tasks:
            await asyncio.wait(tasks)

    async def until_all_received(self) -> None:
        deadline = asyncio.get_running_loop().time() + 20
        while missing := self.missing():
            assert asyncio.get_running_loop().time() < deadline, f"lost: {missing}"
            await asyncio.sleep(0.05)

    def missing(self) -> dict[str, set[int]]:
        return {
            channel: lost
            for channel, due in self.due.items()
            if (lost := due - self.received[channel].keys())
        }

    async def end(self) -> None:
        for group in self.groups:
            for channel in self.wild:
                await self.receiver.group_discard(group, channel)
        for channel in self.tame:
            await self.receiver.group_discard("tame", channel)
        for reader in self.readers:
            reader.cancel()
        await asyncio.wait(self.readers)
        for reader in self.readers:
            assert reader.cancelled()


async def test_cancelled_calls_harm_no_other_and_leave_nothing(
    open_layer: OpenLayer,
    own_broker: PrivateBroker,
    groups_exchange: str,
    lines_without_errors: LogLines,
) -> None:
    # Room for all: what isn't read at once must not be refused.
    config: dict[str, Any] = {
        "host": own_broker.url,
        "remote_capacity": None,
        "local_capacity": 1000,
    }
    sender, receiver = await open_layer(**config), await open_layer(**config)
    await asyncio.gather(sender.connect(), receiver.connect())
    connections = [publisher_of(layer).supervisor.connection for layer in (sender, receiver)]
    tasks_before, futures_before = asyncio.all_tasks(), pending_futures()
    storm = CancellationStorm(sender, receiver, seed=5)
    await storm.prepare()
    await storm.run(_CANCELLED_CALLS.count, _CALLS_LEFT_ALONE.count)
    await storm.until_all_received()
    await storm.end()

    twice = {
        (channel, number)
        for channel, numbers in storm.received.items()
        for number, times in numbers.items()
        if times > 1
    }
    assert twice == set()
    # Many calls of each kind had not ended; a group_discard() never waits.
    logger.info("cancelled before their end: %s", dict(storm.cancelled))
    assert storm.cancelled.keys() >= {"send", "group_send", "group_add", "receive"}
    for layer in (sender, receiver):
        await until_nothing_remains(layer)
    assert asyncio.all_tasks() <= tasks_before  # Those that greet other processes end.
    del storm
    assert pending_futures() <= futures_before
    assert await bound_groups(own_broker, groups_exchange, receiver) == set()
    # Nobody's connection was the price.
    assert connections == [
        publisher_of(layer).supervisor.connection for layer in (sender, receiver)
    ]
    assert not [line for line in lines_without_errors.rest() if line.startswith("WARNING")]


# Joining and leaving


class MembershipStorm:
    """Tasks that add and discard; each pair of channel and group is one task's own."""

    CHANNELS = 200
    GROUPS = 50
    TASKS = 40

    def __init__(self, layer: RabbitmqChannelLayer, seed: int) -> None:
        self.layer = layer
        self.chance = random.Random(seed)
        self.groups = [f"g{n}" for n in range(self.GROUPS)]
        self.channels: list[str] = []
        self.members: dict[str, set[str]] = {}  # what should be: groups by channel
        self.calls: Counter[str] = Counter()

    async def run(self, duration: float) -> None:
        self.channels = [await self.layer.new_channel() for _ in range(self.CHANNELS)]
        self.members = {channel: set() for channel in self.channels}
        pairs = [(channel, group) for channel in self.channels for group in self.groups]
        self.chance.shuffle(pairs)
        deadline = asyncio.get_running_loop().time() + duration
        await asyncio.gather(
            *(self._join_and_leave(pairs[n :: self.TASKS], deadline) for n in range(self.TASKS))
        )

    async def _join_and_leave(self, pairs: list[tuple[str, str]], deadline: float) -> None:
        while asyncio.get_running_loop().time() < deadline:
            channel, group = self.chance.choice(pairs)
            if self.chance.random() < 0.5:
                await self._join(channel, group)
            else:
                await self.layer.group_discard(group, channel)
                self.members[channel].discard(group)
                self.calls["discard"] += 1
            await asyncio.sleep(self.chance.expovariate(200))

    async def _join(self, channel: str, group: str) -> None:
        joining = asyncio.create_task(self.layer.group_add(group, channel))
        if self.chance.random() < 0.2:
            for _ in range(self.chance.randrange(5)):
                await asyncio.sleep(0)  # so that it has come to one point or another
            joining.cancel()
        await asyncio.wait([joining])
        if joining.cancelled():
            self.calls["cancelled add"] += 1  # The channel is what it was.
        elif joining.exception() is None:
            self.calls["add"] += 1
            self.members[channel].add(group)
        else:
            assert isinstance(joining.exception(), BrokerUnavailable)
            self.calls["failed add"] += 1

    def wanted_groups(self) -> set[str]:
        return set().union(*self.members.values())


async def test_joins_and_leaves_end_as_the_last_call_said(
    open_layer: OpenLayer,
    own_broker: PrivateBroker,
    groups_exchange: str,
    lines_without_errors: LogLines,
) -> None:
    sender = await open_layer(host=own_broker.url)
    layer = await open_layer(
        host=own_broker.url, remote_capacity=None, local_capacity=MembershipStorm.CHANNELS
    )
    await layer.connect()
    storm = MembershipStorm(layer, seed=6)
    storming = asyncio.create_task(storm.run(_JOINS_AND_LEAVES.value))
    losses = 0
    while not storming.done():
        await asyncio.wait([storming], timeout=1.0)
        if not storming.done():
            await asyncio.to_thread(own_broker.close_all_connections, "for a test")
            await lines_without_errors.next("WARNING subscriber .*: connected again")
            losses += 1
    storming.result()
    # Few are left, so that some groups have lost their last member.
    for channel in storm.channels:
        for group in storm.chance.sample(storm.groups, len(storm.groups) - 1):
            await layer.group_discard(group, channel)
            storm.members[channel].discard(group)
    for group in storm.groups[::2]:
        for channel in storm.channels:
            await layer.group_discard(group, channel)
            storm.members[channel].discard(group)
    logger.info("%s, connections lost %d times", dict(storm.calls), losses)
    assert losses
    assert storm.calls["add"]
    assert storm.calls["cancelled add"]

    wanted = storm.wanted_groups()
    assert 0 < len(wanted) < len(storm.groups)
    # Until the linger is over, and what the last loss left unbound is bound
    kinds = ("groups with members", "groups wanted", "groups bound")
    deadline = asyncio.get_running_loop().time() + 20
    while remains(layer) != dict.fromkeys(kinds, len(wanted)):
        assert asyncio.get_running_loop().time() < deadline, remains(layer)
        await asyncio.sleep(0.05)
    bindings = inside(layer).bindings
    assert {group for group in storm.groups if bindings.is_bound(group)} == wanted
    assert await bound_groups(own_broker, groups_exchange, layer) == wanted

    async def hear(channel: str) -> list[str]:
        heard = []
        while (message := await asyncio.wait_for(layer.receive(channel), 30)) != {"end": True}:
            heard.append(message["group"])
        return heard

    hearing = [asyncio.create_task(hear(channel)) for channel in storm.channels]
    for group in storm.groups:
        await sender.group_send(group, {"group": group})
    # From the same sender, so behind all of these.
    for channel in storm.channels:
        await sender.send(channel, {"end": True})
    for channel, task in zip(storm.channels, hearing, strict=True):
        heard = await task
        assert len(heard) == len(set(heard))
        assert set(heard) == storm.members[channel]
