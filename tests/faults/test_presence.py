"""Who is in a group, while processes come and go, and while everything fails: in time, and honest.

A result may lack something only if it says so. Measured figures go to the log
(``pytest --log-cli-level=INFO``).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq._peers import processes as _processes
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import AmqpProxy
from tests.support.changes import until
from tests.support.layers import inside, statistics_of, subscriber_of
from tests.support.lengths import Length
from tests.support.log_lines import log_lines, unhandled
from tests.support.loop_thread import LoopThread
from tests.support.presence import Asked, History, MemberProcess, Oracle, ask
from tools.private_broker import PrivateBroker

pytestmark = pytest.mark.slow

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]
StartMember = Callable[..., Awaitable[MemberProcess]]

figures = logging.getLogger("figures")

GROUP = "room"
MESSAGE = {"type": "test.message"}
# Seconds of coming and going.
_CHURN = Length(full=60.0, brief=8.0)
# Seconds by which a busy machine may be late.
_GRACE = 4.0


@pytest.fixture(autouse=True)
def _nothing_unhandled(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert unhandled(caplog) == []


@pytest.fixture
async def start_member(
    fault_broker: PrivateBroker, groups_exchange: str
) -> AsyncIterator[StartMember]:
    """Starts processes, and ends those that are left at the end of the test."""
    started: list[MemberProcess] = []

    async def start(url: str = fault_broker.url, **options: Any) -> MemberProcess:
        member = await MemberProcess.start(url, groups_exchange, GROUP, **options)
        started.append(member)
        return member

    yield start
    for member in started:
        member.go_on() if member.process.returncode is None else None
        await member.end()


async def ask_until_complete(layer: RabbitmqChannelLayer, timeout: float = 1.0) -> Asked:
    """Ask again and again, for half a minute at most."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(BrokerUnavailable):
            asked = await ask(layer, GROUP, timeout)
            assert asked.took < timeout + _GRACE
            if asked.result.is_complete:
                return asked
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


# Coming and going


class Churn:
    """Processes whose channels join and leave, that come, end in order, and are killed."""

    PROCESSES = 4

    def __init__(self, start_member: StartMember, seed: int) -> None:
        self._start_member = start_member
        self._chance = random.Random(seed)
        self._seeds = itertools.count(seed)
        self.running: list[MemberProcess] = []
        self.all: list[MemberProcess] = []
        self.ends: Counter[str] = Counter()

    async def come(self) -> None:
        member = await self._start_member(channels=5, seed=next(self._seeds))
        self.running.append(member)
        self.all.append(member)
        await member.joined()

    async def go(self, number: signal.Signals) -> None:
        member = self.running.pop(self._chance.randrange(len(self.running)))
        self.ends[number.name] += 1
        await member.end(number)

    async def run(self, seconds: float) -> None:
        """They come and end in order; every twenty seconds, and at the end, one is killed.

        (Nothing is complete for ten seconds after that.)
        """
        begun = time.monotonic()
        kill_at = begun + 20
        await asyncio.gather(*(self.come() for _ in range(self.PROCESSES)))
        while time.monotonic() < begun + seconds:
            await asyncio.sleep(self._chance.uniform(0.1, 0.6))
            is_killed = time.monotonic() > kill_at
            kill_at += 20 * is_killed
            await self.go(signal.SIGKILL if is_killed else signal.SIGTERM)
            await self.come()
        await self.go(signal.SIGKILL)
        await asyncio.sleep(0.5)

    def histories(self) -> dict[str, History]:
        return {name: one for member in self.all for name, one in member.histories.items()}


async def ask_all_the_time(layer: RabbitmqChannelLayer, results: list[Asked]) -> None:
    while True:
        results.append(await ask(layer, GROUP))
        await asyncio.sleep(0.01)


async def ask_as_somebody_new(open_layer: OpenLayer, url: str, results: list[Asked]) -> None:
    """The first question of a process that has just started."""
    while True:
        layer = await open_layer(host=url)
        results.append(await ask(layer, GROUP, 10.0))
        await layer.close()
        await asyncio.sleep(0.05)


async def test_under_churn_no_complete_result_lacks_a_member(
    open_layer: OpenLayer, fault_broker: PrivateBroker, start_member: StartMember
) -> None:
    churn = Churn(start_member, seed=14)
    url = fault_broker.url
    results: dict[str, list[Asked]] = {"one": [], "another": [], "new": []}
    askers = [
        asyncio.create_task(ask_all_the_time(await open_layer(host=url), results["one"])),
        asyncio.create_task(ask_all_the_time(await open_layer(host=url), results["another"])),
        asyncio.create_task(ask_as_somebody_new(open_layer, url, results["new"])),
    ]
    await churn.run(_CHURN.value)
    for asker in askers:
        asker.cancel()
    await asyncio.wait(askers)
    for asker in askers:
        with contextlib.suppress(asyncio.CancelledError):
            asker.result()
    for member in churn.running:
        await member.end(signal.SIGTERM)
    oracle = Oracle(churn.histories())
    for name, asked in results.items():
        complete = [one for one in asked if one.result.is_complete]
        took = sorted(one.took for one in complete)
        figures.info(
            "%s: %d results, %d complete, median %.1f ms, %d members at most",
            name,
            len(asked),
            len(complete),
            1000 * took[len(took) // 2],
            max(len(one.channels) for one in asked),
        )
        assert len(complete) > 5
        assert max(len(one.channels) for one in complete) > Churn.PROCESSES
        for one in asked:
            assert one.took < one.timeout + _GRACE
            assert oracle.lacking(one) == set(), one
            assert oracle.wrong(one) == set(), one
    figures.info("%d processes, ends: %s", len(churn.all), dict(churn.ends))
    assert churn.ends.keys() == {"SIGKILL", "SIGTERM"}


# Faults of the broker


class Room:
    """Three members in three layers, all of one process, and a layer that asks."""

    def __init__(
        self, asker: RabbitmqChannelLayer, members: list[tuple[RabbitmqChannelLayer, str]]
    ) -> None:
        self.asker = asker
        self.layers = [layer for layer, _ in members]
        self.channels = {channel for _, channel in members}
        self.results: Counter[str] = Counter()

    async def ask_while(self, event: asyncio.Task[Any], timeout: float = 1.0) -> None:
        """Ask all the time, until the event is over: each result is in time, and honest."""
        while not event.done():
            await self.ask_once(timeout)
            await asyncio.sleep(0.005)
        event.result()

    async def ask_once(self, timeout: float = 1.0) -> None:
        begun = time.monotonic()
        try:
            asked = await ask(self.asker, GROUP, timeout)
        except BrokerUnavailable:
            self.results["unavailable"] += 1
        else:
            self.results["complete" if asked.result.is_complete else "incomplete"] += 1
            self.must_be_honest(asked)
        assert time.monotonic() - begun < timeout + _GRACE

    def must_be_honest(self, asked: Asked) -> None:
        assert asked.channels <= self.channels
        if asked.result.is_complete:
            assert asked.channels == self.channels
        named = {*asked.result.silent, *asked.result.absent}
        assert named <= {statistics_of(layer).id for layer in self.layers}


@pytest.fixture
async def open_room(open_layer: OpenLayer) -> Callable[..., Awaitable[Room]]:
    async def open_one(url: str, **config: Any) -> Room:
        members = []
        for _ in range(3):
            layer = await open_layer(host=url, **config)
            channel = await layer.new_channel()
            await layer.group_add(GROUP, channel)
            members.append((layer, channel))
        room = Room(await open_layer(host=url, **config), members)
        room.must_be_honest(await ask_until_complete(room.asker))
        return room

    return open_one


OpenRoom = Callable[..., Awaitable[Room]]


async def test_forced_close_of_all_connections(
    open_room: OpenRoom, fault_broker: PrivateBroker
) -> None:
    room = await open_room(fault_broker.url)
    for _ in range(3):
        closing = asyncio.create_task(
            asyncio.to_thread(fault_broker.close_all_connections, "for a test")
        )
        await room.ask_while(closing)
        back = asyncio.create_task(ask_until_complete(room.asker))
        room.must_be_honest(await back)
    figures.info("%s", dict(room.results))
    assert room.results["complete"] > 0


async def test_restart_of_the_broker(open_room: OpenRoom, private_broker: PrivateBroker) -> None:
    room = await open_room(private_broker.url)

    def restart() -> None:
        private_broker.kill()
        private_broker.start()

    await room.ask_while(asyncio.create_task(asyncio.to_thread(restart)))
    assert room.results["unavailable"] > 0

    async def come_back() -> None:
        # A result without those that aren't back yet says so: all were known before.
        await ask_until_complete(room.asker)

    await room.ask_while(asyncio.create_task(come_back()))
    room.must_be_honest(await ask_until_complete(room.asker))
    figures.info("%s", dict(room.results))
    channel = next(iter(room.channels))
    await room.asker.group_add("another", channel)
    result = await room.asker.group_members("another", 5.0)
    assert [member.channel for member in result.members] == [channel]


async def test_an_alarm_of_the_broker(
    open_room: OpenRoom, open_layer: OpenLayer, private_broker: PrivateBroker
) -> None:
    """All is quiet; joining goes on; afterwards all is as before, with those who came meanwhile."""
    room = await open_room(private_broker.url)
    channel = next(iter(room.channels))
    await asyncio.to_thread(private_broker.ctl, "set_vm_memory_high_watermark", "0.00000001")
    # RabbitMQ tells only those that publish.
    layers = (*room.layers, room.asker)
    while not all(statistics_of(layer).is_blocked for layer in layers):
        # The first message of each waits for its confirm until its time is over.
        await asyncio.gather(*(layer.group_send("nobody", MESSAGE) for layer in layers))
    before = [statistics_of(layer).counters.requests for layer in room.layers]
    asked = await ask(room.asker, GROUP, 5.0)
    assert asked.took < _GRACE
    assert not asked.result.is_complete
    assert len(asked.result.silent) == 3
    with pytest.raises(BrokerUnavailable, match="takes nothing"):
        await asyncio.wait_for(room.asker.group_add("another", channel), 20)
    new = await open_layer(host=private_broker.url)
    new_channel = await new.new_channel()
    await asyncio.wait_for(new.group_add(GROUP, new_channel), 5)
    assert [statistics_of(layer).counters.requests for layer in room.layers] == before
    await asyncio.to_thread(private_broker.end_memory_alarm)
    await until(lambda: not statistics_of(room.asker).is_blocked)
    await until(lambda: statistics_of(room.asker).processes.known == 4)
    asked = await ask_until_complete(room.asker)
    assert asked.channels == {*room.channels, new_channel}


async def test_the_queue_of_requests_is_deleted(
    open_room: OpenRoom, fault_broker: PrivateBroker
) -> None:
    room = await open_room(fault_broker.url)
    queue = subscriber_of(room.layers[0])._topology.requests_queue
    with log_lines() as lines:
        await asyncio.to_thread(
            fault_broker.ctl,
            "eval",
            f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)), '
            'rabbit_amqqueue:delete(Q, false, false, <<"test">>).',
        )
        await lines.next("WARNING subscriber .*: connected again")
    room.must_be_honest(await ask_until_complete(room.asker))


# Faults of processes


async def test_a_process_that_is_held(
    open_layer: OpenLayer, fault_broker: PrivateBroker, start_member: StartMember
) -> None:
    held, running = await start_member(), await start_member()
    channels = {await held.joined(), await running.joined()}
    asker = await open_layer(host=fault_broker.url)
    assert (await ask_until_complete(asker)).channels == channels
    held.stop()
    for timeout in (0.3, 1.0):
        asked = await ask(asker, GROUP, timeout)
        assert timeout * 0.9 < asked.took < timeout + _GRACE
        assert not asked.result.is_complete
        assert (asked.result.silent, asked.result.absent) == ((held.id,), ())
        assert asked.channels == running.channels
    other = await open_layer(host=fault_broker.url, operation_timeout=1)
    with pytest.raises(BrokerUnavailable, match="did not answer in time"):
        await other.group_add("another", next(iter(held.channels)))
    assert await asker.group_count(GROUP, 0.3) == 1
    held.go_on()
    assert (await ask_until_complete(asker)).channels == channels
    counters = statistics_of(asker).counters
    assert counters.silent == counters.incomplete >= 3


async def test_a_process_that_is_killed(
    open_layer: OpenLayer,
    fault_broker: PrivateBroker,
    start_member: StartMember,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_processes, "GONE_AFTER", 3.0)
    killed, running = await start_member(), await start_member()
    channel, other = await killed.joined(), await running.joined()
    asker = await open_layer(host=fault_broker.url)
    assert (await ask_until_complete(asker)).channels == {channel, other}
    await killed.end()
    begun = time.monotonic()
    asked = await ask(asker, GROUP)
    assert asked.channels == {other}
    while not asked.result.is_complete:
        assert asked.result.silent == () or asked.result.silent == (killed.id,)
        assert asked.channels == {other}
        asked = await ask(asker, GROUP)
        await asyncio.sleep(0.05)
    assert time.monotonic() - begun < 3 + _GRACE
    with pytest.raises(ValueError, match="is gone"):
        await asker.group_add("another", channel)


async def test_a_loop_that_is_blocked(open_layer: OpenLayer, fault_broker: PrivateBroker) -> None:
    layer = await open_layer(host=fault_broker.url)
    with LoopThread() as other:
        channel = await other.run(layer.new_channel())
        await layer.group_add(GROUP, channel)
        assert (await ask_until_complete(layer)).channels == {channel}
        blocked = asyncio.Event()
        loop = asyncio.get_running_loop()

        def block() -> None:
            loop.call_soon_threadsafe(blocked.set)
            time.sleep(2)  # as sync code does in an async consumer

        other.loop.call_soon_threadsafe(block)
        await blocked.wait()
        asked = await ask(layer, GROUP, 0.5)
        assert asked.took < 0.5 + _GRACE
        assert not asked.result.is_complete
        assert asked.result.silent == (channel.partition("!")[0],)
        assert (await ask_until_complete(layer)).channels == {channel}
        await other.run(layer.close())


async def test_a_process_whose_queue_of_messages_is_full(
    open_layer: OpenLayer, fault_broker: PrivateBroker
) -> None:
    """It answers as fast as any other, and is added to groups."""
    url = fault_broker.url
    stuck = await open_layer(host=url, local_capacity=1, remote_capacity=5)
    channel = await stuck.new_channel()
    await stuck.group_add(GROUP, channel)
    asker = await open_layer(host=url)
    await ask_until_complete(asker)

    async def fill() -> None:
        while True:
            await asker.send(channel, MESSAGE)

    with pytest.raises(ChannelFull):
        await asyncio.wait_for(fill(), 20)
    took = []
    for number in range(50):
        asked = await ask(asker, GROUP)
        assert asked.result.is_complete
        assert asked.channels == {channel}
        took.append(asked.took)
        await asker.group_add(f"g{number}", channel)
    figures.info("median %.1f ms", 1000 * sorted(took)[25])
    assert sorted(took)[25] < 0.1  # In the messages' queue it would be the whole time.


# Faults of the asker


async def test_an_own_connection_that_is_lost(
    open_layer: OpenLayer, fault_broker: PrivateBroker, start_member: StartMember
) -> None:
    """While it waits for an answer: it asks again, and is silent about nothing."""
    held = await start_member()
    channel = await held.joined()
    async with AmqpProxy(fault_broker.url) as proxy:
        asker = await open_layer(host=proxy.url)
        assert (await ask_until_complete(asker)).channels == {channel}
        held.stop()
        for name in ("subscriber", "publisher"):
            asking = asyncio.create_task(ask(asker, GROUP, 2.0))
            await asyncio.sleep(0.3)
            proxy.cut(name=name)
            asked = await asking
            assert asked.took < 2 + _GRACE
            assert not asked.result.is_complete
            assert asked.channels == set()
        asking = asyncio.create_task(ask(asker, GROUP, 9.0))
        await asyncio.sleep(0.3)
        proxy.cut()
        held.go_on()
        asked = await asking
        assert asked.result.is_complete
        assert asked.channels == {channel}
        proxy.refuse()
        proxy.cut()
        await until(lambda: statistics_of(asker).subscriber.state != "connected")
        begun = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await asker.group_members(GROUP, 0.5)
        assert time.monotonic() - begun < 0.5 + _GRACE
        await asker.close()
        assert len(inside(asker).peers._asker.questions) == 0
