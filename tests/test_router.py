"""Mailboxes, receivers, acks, expiry, stalled channels: rules without a broker, time by hand."""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import random
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, cast

import pytest
from channels.exceptions import StopConsumer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from channels_rabbitmq import _router
from channels_rabbitmq._codec import Envelope, MessageCodec
from channels_rabbitmq._mailbox import Loan, Mailbox
from channels_rabbitmq._members import Members
from channels_rabbitmq._router import TICK_INTERVAL, Router
from channels_rabbitmq._statistics import Counters


class FakeEnvelope:
    """What the router uses of an envelope. The message holds a number to know it by."""

    def __init__(
        self, number: int, *, channel: str | None = None, group: str | None = None, size: int = 10
    ) -> None:
        self.number = number
        self.channel = channel
        self.group = group
        self.size = size
        self.flat: dict[str, Any] | None = None  # so that message() is asked for each copy
        # How often a copy was made
        self.copies = 0

    def message(self) -> dict[str, Any]:
        self.copies += 1
        return {"number": self.number}


class Rig:
    """A router with a clock moved by hand and a feeder that knows what is acked."""

    def __init__(
        self,
        *,
        local_capacity: int = 10,
        local_expiry: float = 60.0,
        capacity: int = 100,
        channel_capacity: dict[str, int] | None = None,
    ) -> None:
        self.now = 1000.0
        self.members = Members()
        self.counters = Counters()
        # (reason, channel) for each message dropped
        self.reports: list[tuple[str, str]] = []
        # Numbers of the deliveries acked, in order
        self.acked: list[int] = []
        # The receives that start_receive() started
        self.tasks: list[asyncio.Task[int]] = []
        self.numbers = itertools.count(1)
        self.local_capacity = local_capacity
        capacities = channel_capacity or {}
        self.router = Router(
            members=self.members,
            local_capacity=local_capacity,
            local_expiry=local_expiry,
            capacity_of=lambda channel: capacities.get(channel, capacity),
            counters=self.counters,
            report=lambda reason, channel: self.reports.append((reason, channel)),
            clock=lambda: self.now,
            create_future=lambda: asyncio.get_running_loop().create_future(),
        )

    def join(self, group: str, *channels: str) -> None:
        for channel in channels:
            self.members.settle(self.members.join(group, channel), True)

    def deliver(
        self, channel: str | None = None, *, group: str | None = None, size: int = 10
    ) -> FakeEnvelope:
        envelope = FakeEnvelope(next(self.numbers), channel=channel, group=group, size=size)
        self.router.deliver(cast(Envelope, envelope), envelope.number, self)
        return envelope

    def ack(self, delivery_tag: int) -> None:
        self.acked.append(delivery_tag)

    def fill(self, channel: str, count: int) -> None:
        for _ in range(count):
            self.deliver(channel)

    def take(self, channel: str) -> int:
        """What ``receive()`` returns without waiting; fails if it would wait."""
        coroutine = self.router.receive(channel)
        try:
            coroutine.send(None)
        except StopIteration as finished:
            return int(finished.value["number"])
        raise AssertionError("receive() waits")

    def lend(self, channel: str) -> Loan:
        """What ``lend()`` returns without waiting; fails if it would wait."""
        coroutine = self.router.lend(channel)
        try:
            coroutine.send(None)
        except StopIteration as finished:
            loan: Loan = finished.value
            return loan
        raise AssertionError("lend() waits")

    def take_all(self, channel: str, count: int) -> list[int]:
        return [self.take(channel) for _ in range(count)]

    def wait_and_tick(self, seconds: float) -> None:
        self.now += seconds
        self.router.tick()

    def check_books(self) -> None:
        """Count everything anew and compare with what the router keeps."""
        router = self.router
        mailboxes = router._mailboxes
        held = [(box, d, i) for box in mailboxes.values() for i, d in enumerate(box.messages or ())]
        counting = Counter(d for box, d, i in held if i >= box.uncounted)
        uncounted = Counter(d for box, d, i in held if i < box.uncounted)
        counting.update(loan.delivery for loan in router._loans if loan.counts)
        for _, delivery, _ in held:
            assert delivery.counting == counting[delivery]
            assert delivery.uncounted == uncounted[delivery]
        assert router.in_use == len(counting)
        assert router.waiting_messages == len(held)
        assert router._uncounted_bytes == sum(d.envelope.size for d in uncounted)
        assert set(router._holding) == {box for box in mailboxes.values() if box.messages}
        assert set(router._holding) <= set(mailboxes.values())
        assert [box for box in mailboxes.values() if box.is_idle] in ([], [router._just_idle])
        assert all(box.messages != deque() for box in mailboxes.values())
        for box in mailboxes.values():
            numbers = [delivery.number for delivery in box.messages or ()]
            assert numbers == sorted(numbers)
            if box.backlog is not None:
                assert box.backlog is box.messages
                assert not box.stalled
                assert not box.uncounted
        listed = {box for _, _, box in router._uncounted_by_age}
        assert {box for box in mailboxes.values() if box.uncounted} <= listed
        assert router.stalled_channels == sum(box.stalled for box in mailboxes.values())
        assert router.channels == sum(not box.is_idle for box in mailboxes.values())
        assert router.lent_messages == len(router._loans)

    def check_nothing_left(self) -> None:
        self.router.tick()
        assert self.router.idle
        assert self.router.in_use == self.router.waiting_messages == 0
        assert self.router.next_tick_at() is None
        assert not self.router._holding
        assert not self.router._uncounted_by_age
        router = self.router
        assert router.channels == router.receivers == router.lent_messages == 0
        assert router.uncounted_bytes == router.stalled_channels == 0


@pytest.fixture
async def make_rig() -> AsyncIterator[Callable[..., Rig]]:
    """Makes rigs; cancels at the end the receives that are still waiting."""
    rigs: list[Rig] = []

    def make(**options: Any) -> Rig:
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for task in itertools.chain.from_iterable(rig.tasks for rig in rigs):
        task.cancel()
    await let_run()


@pytest.fixture
async def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


async def let_run() -> None:
    """Let tasks run that were just made, cancelled or woken, and what they wake in turn."""
    for _ in range(5):
        await asyncio.sleep(0)


async def start_receive(rig: Rig, channel: str) -> asyncio.Task[int]:
    """A ``receive()`` that is waiting now."""

    async def receive() -> int:
        return int((await rig.router.receive(channel))["number"])

    task = asyncio.create_task(receive())
    rig.tasks.append(task)
    await let_run()
    return task


async def start_lend(rig: Rig, channel: str) -> asyncio.Task[Loan]:
    """A ``lend()`` that is waiting now."""
    task = asyncio.create_task(rig.router.lend(channel))
    rig.tasks.append(task)  # type: ignore[arg-type]  # all that is done with it is to cancel it
    await let_run()
    return task


# Deliveries


def test_message_waits_for_its_receiver(rig: Rig) -> None:
    rig.deliver("a")
    assert rig.router.in_use == 1
    assert rig.acked == []
    assert rig.take("a") == 1
    assert rig.acked == [1]
    assert rig.counters.received == 1
    rig.check_nothing_left()


def test_direct_and_group_messages_come_in_order(rig: Rig) -> None:
    rig.join("g", "a", "b")
    rig.deliver("a")
    rig.deliver(group="g")
    rig.deliver("b")
    rig.deliver("a")
    rig.deliver(group="g")
    assert rig.take_all("a", 4) == [1, 2, 4, 5]
    assert rig.take_all("b", 3) == [2, 3, 5]
    rig.check_nothing_left()


def test_group_delivery_counts_once_and_is_acked_by_the_last_member(rig: Rig) -> None:
    rig.join("g", "a", "b", "c")
    rig.deliver(group="g")
    assert rig.router.in_use == 1
    assert rig.router.waiting_messages == 3
    rig.take("b")
    rig.take("a")
    assert rig.acked == []
    assert rig.router.in_use == 1
    rig.take("c")
    assert rig.acked == [1]
    assert rig.counters.received == 3
    rig.check_nothing_left()


def test_group_without_members_is_acked_at_once(rig: Rig) -> None:
    rig.deliver(group="g")
    assert rig.acked == [1]
    assert rig.counters.unwanted == 1
    rig.check_nothing_left()


def test_each_receiver_has_its_copy_made_when_it_receives(rig: Rig) -> None:
    rig.join("g", "a", "b")
    envelope = rig.deliver(group="g")
    assert envelope.copies == 0
    rig.take("a")
    assert envelope.copies == 1
    rig.take("b")
    assert envelope.copies == 2


async def test_what_is_set_aside_for_several_is_not_given_to_others(rig: Rig) -> None:
    tasks = [await start_receive(rig, "a") for _ in range(2)]
    rig.fill("a", 2)
    assert rig.router.receive_nowait("a") is None
    assert [await task for task in tasks] == [1, 2]
    rig.check_nothing_left()


async def test_each_group_message_of_a_turn_wakes_a_receiver(rig: Rig) -> None:
    rig.join("g", "a")
    tasks = [await start_receive(rig, "a") for _ in range(3)]
    for _ in range(3):
        rig.deliver(group="g")
    assert [await task for task in tasks] == [1, 2, 3]
    rig.check_nothing_left()


@pytest.mark.parametrize("data", [b"flat", [1]])
def test_each_member_gets_its_own_copies_of_a_burst(rig: Rig, data: object) -> None:
    codec = MessageCodec(max_message_size=1000)
    messages = [{"type": "test.message", "n": n, "data": data} for n in range(3)]
    rig.join("g", "a", "b")
    for n, message in enumerate(messages):
        rig.router.deliver(codec.decode(codec.encode_for_group("g", message)), n, rig)
    copies = [[rig.router.receive_nowait(channel) for _ in messages] for channel in "ab"]
    assert copies == [messages, messages]
    for one in copies[0]:
        assert one is not None
        one["n"] = "changed"
        if isinstance(one["data"], list):
            one["data"].append("changed")
    assert copies[1] == messages
    assert rig.acked == [0, 1, 2]
    rig.check_nothing_left()


def test_nothing_is_kept_of_a_message_handed_out(rig: Rig) -> None:
    envelope = weakref.ref(rig.deliver("a"))
    rig.take("a")
    gc.collect()
    assert envelope() is None
    rig.check_nothing_left()


# Waiting receivers


async def test_waiting_receiver_gets_the_next_message(rig: Rig) -> None:
    task = await start_receive(rig, "a")
    assert not rig.router.idle
    rig.deliver("a")
    assert rig.acked == []  # Woken, but not taken yet
    assert await task == 1
    assert rig.acked == [1]
    rig.check_nothing_left()


async def test_each_waiting_receiver_gets_one_message_in_turn(rig: Rig) -> None:
    tasks = [await start_receive(rig, "a") for _ in range(3)]
    rig.fill("a", 2)
    await let_run()
    assert [task.done() for task in tasks] == [True, True, False]
    rig.fill("a", 2)
    assert [await task for task in tasks] == [1, 2, 3]
    assert rig.take("a") == 4
    rig.check_nothing_left()


async def test_new_receiver_does_not_take_what_is_set_aside_for_a_woken_one(rig: Rig) -> None:
    woken = await start_receive(rig, "a")
    rig.deliver("a")
    with pytest.raises(AssertionError, match="receive\\(\\) waits"):
        rig.take("a")
    rig.fill("a", 2)
    assert rig.take("a") == 1  # Two of the three are not set aside; whoever comes takes the oldest.
    assert await woken == 2
    assert rig.take("a") == 3
    rig.check_nothing_left()


async def test_receiver_cancelled_while_waiting_changes_nothing(rig: Rig) -> None:
    first, second = await start_receive(rig, "a"), await start_receive(rig, "a")
    first.cancel()
    rig.deliver("a")  # Before the cancelled one could clean up
    assert await second == 1
    assert first.cancelled()
    rig.check_nothing_left()


@pytest.mark.parametrize("position", [0, 1, 2, 3])
async def test_receiver_cancelled_anywhere_in_line_leaves_the_others_in_order(
    rig: Rig, position: int
) -> None:
    tasks = [await start_receive(rig, "a") for _ in range(4)]
    tasks.pop(position).cancel()
    await let_run()
    rig.fill("a", 3)
    assert [await task for task in tasks] == [1, 2, 3]
    rig.check_nothing_left()


async def test_receiver_cancelled_when_woken_passes_its_message_on(rig: Rig) -> None:
    first, second = await start_receive(rig, "a"), await start_receive(rig, "a")
    rig.deliver("a")
    first.cancel()
    await let_run()
    assert first.cancelled()
    assert await second == 1
    rig.check_nothing_left()


async def test_receiver_cancelled_when_woken_leaves_its_message_to_the_next_call(rig: Rig) -> None:
    task = await start_receive(rig, "a")
    rig.deliver("a")
    rig.deliver("a")
    task.cancel()
    await let_run()
    assert task.cancelled()
    assert rig.acked == []
    assert rig.take_all("a", 2) == [1, 2]
    rig.check_nothing_left()


async def test_all_woken_receivers_cancelled_lose_nothing(rig: Rig) -> None:
    tasks = [await start_receive(rig, "a") for _ in range(4)]
    rig.fill("a", 2)
    for task in tasks[:3]:
        task.cancel()
    await let_run()
    assert await tasks[3] == 1
    assert rig.take("a") == 2
    rig.check_nothing_left()


async def test_receiver_cleans_up_after_its_mailbox_has_gone(rig: Rig) -> None:
    """It was left out of the line; meanwhile others came and went, and one waits now."""
    cancelled = await start_receive(rig, "a")
    cancelled.cancel()
    rig.deliver("a")
    assert rig.take("a") == 1
    assert rig.router.idle
    waiting = rig.router.receive("a")
    waiting.send(None)
    await let_run()
    assert cancelled.cancelled()
    assert not rig.router.idle
    waiting.close()
    rig.check_nothing_left()


async def test_time_limit_around_receive_loses_nothing(rig: Rig) -> None:
    """channels_redis lost 178 of 300 messages this way."""
    for _ in range(3):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(rig.router.receive("a"), 0.001)
    assert rig.router.idle
    rig.deliver("a")
    assert (await asyncio.wait_for(rig.router.receive("a"), 60))["number"] == 1
    rig.check_nothing_left()


async def test_receiver_woken_for_a_message_that_expires_waits_on_in_front(rig: Rig) -> None:
    tasks = [await start_receive(rig, "a") for _ in range(3)]
    rig.deliver("a")
    rig.now += 60
    await let_run()
    assert not tasks[0].done()
    assert rig.reports == [("expired", "a")]
    rig.fill("a", 3)
    assert [await task for task in tasks] == [2, 3, 4]
    rig.check_nothing_left()


async def test_woken_receivers_share_what_is_left(rig: Rig) -> None:
    """Two were woken, one of their messages expired: one takes the other, one waits on."""
    first, second = await start_receive(rig, "a"), await start_receive(rig, "a")
    rig.deliver("a")
    rig.now += 59
    rig.deliver("a")
    rig.now += 1
    await let_run()
    assert await first == 2
    assert not second.done()
    rig.deliver("a")
    assert await second == 3
    rig.check_nothing_left()


async def test_receive_that_is_thrown_away_leaves_nothing(rig: Rig) -> None:
    waiting = rig.router.receive("a")
    waiting.send(None)
    waiting.close()
    rig.check_nothing_left()
    woken = rig.router.receive("a")
    woken.send(None)
    rig.deliver("a")
    woken.close()
    assert rig.take("a") == 1
    rig.check_nothing_left()


def test_loop_closed_under_its_receivers(rig: Rig) -> None:
    """Nobody is woken on a loop that is gone; nothing raises."""
    loop = asyncio.new_event_loop()
    receives = [rig.router.receive("a") for _ in range(3)]
    tasks = [loop.create_task(receive) for receive in receives]
    loop.run_until_complete(let_run())
    rig.deliver("a")
    loop.close()
    receives[0].close()  # As the garbage collector does. It was woken; nobody takes its place.
    assert rig.router.waiting_messages == 1
    rig.router.close()
    for receive in receives[1:]:
        receive.close()
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # Known; keeps the log clean.


async def test_random_cancels_lose_nothing_and_duplicate_nothing() -> None:
    """2,000 receives on few channels, a third of them cancelled at any moment."""
    rig = Rig(local_capacity=10_000)
    chance = random.Random(2)
    channels = "abcde"
    received: dict[str, list[int]] = {channel: [] for channel in channels}
    delivered: dict[str, list[int]] = {channel: [] for channel in channels}

    async def receive(channel: str) -> None:
        # No await between: a message that receive() returned is noted.
        received[channel].append((await rig.router.receive(channel))["number"])

    running: list[asyncio.Task[None]] = []
    cancelled = 0
    for _ in range(2000):
        running.append(asyncio.create_task(receive(chance.choice(channels))))
        for _ in range(chance.choice([0, 0, 1, 2])):
            channel = chance.choice(channels)
            delivered[channel].append(rig.deliver(channel).number)
        if chance.random() < 0.33:
            cancelled += chance.choice(running).cancel()
        if chance.random() < 0.5:
            await asyncio.sleep(0)  # One step of the loop: some are woken and have not run.
            running = [task for task in running if not task.done()]
    await let_run()
    rig.check_books()
    assert cancelled > 500
    assert rig.counters.received > 1000
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for channel in channels:
        left = len(delivered[channel]) - len(received[channel])
        received[channel] += rig.take_all(channel, left)
    assert received == delivered
    assert sorted(rig.acked) == sorted(itertools.chain(*delivered.values()))
    rig.check_nothing_left()


# Closing


async def test_close_ends_pending_and_later_receives(rig: Rig) -> None:
    waiting = [await start_receive(rig, "a") for _ in range(3)]
    woken = await start_receive(rig, "b")
    rig.deliver("b")
    rig.deliver("c")
    rig.router.close()
    for task in (*waiting, woken):
        with pytest.raises(StopConsumer):
            await task
    with pytest.raises(StopConsumer):
        await rig.router.receive("c")
    assert rig.acked == []
    assert repr(rig.router) == "<Router: closed>"
    rig.check_nothing_left()


async def test_close_forgets_what_is_stalled(rig: Rig) -> None:
    await stall(rig)
    rig.router.close()
    assert rig.router._uncounted_by_age == []
    rig.check_nothing_left()


async def test_closed_router_ignores_what_still_comes(rig: Rig) -> None:
    rig.deliver("a")
    rig.router.close()
    rig.router.close()
    rig.deliver("a")
    rig.deliver(group="g")
    rig.router.connection_lost()
    assert rig.router.tick() is None
    assert rig.acked == []
    rig.check_nothing_left()


@pytest.mark.parametrize("deliver", [True, False])
async def test_receive_cancelled_at_the_moment_of_closing(rig: Rig, deliver: bool) -> None:
    """It is cancelled, and leaves no exception that nobody fetched."""
    cancelled_first, closed_first = await start_receive(rig, "a"), await start_receive(rig, "a")
    if deliver:
        rig.fill("a", 2)
    cancelled_first.cancel()
    rig.router.close()
    closed_first.cancel()
    await let_run()
    assert cancelled_first.cancelled()
    assert closed_first.cancelled()
    rig.check_nothing_left()


# Expiry


def test_tick_drops_what_has_waited_too_long(rig: Rig) -> None:
    rig.fill("a", 2)
    rig.now += 1
    rig.deliver("a")
    rig.wait_and_tick(58.9)
    assert rig.router.waiting_messages == 3
    rig.wait_and_tick(0.1)
    assert rig.router.waiting_messages == 1
    assert rig.acked == [1, 2]
    assert rig.counters.expired == 2
    assert rig.reports == [("expired", "a")] * 2
    rig.wait_and_tick(1)
    assert rig.acked == [1, 2, 3]
    assert rig.counters.received == 0
    rig.check_nothing_left()


def test_receive_never_returns_an_expired_message(rig: Rig) -> None:
    """Also if no tick has come by."""
    rig.fill("a", 3)
    rig.now += 30
    rig.deliver("a")
    rig.now += 30
    assert rig.take("a") == 4
    assert rig.counters.expired == 3
    assert rig.acked == [1, 2, 3, 4]
    rig.check_nothing_left()


async def test_receive_waits_if_everything_has_expired(rig: Rig) -> None:
    rig.fill("a", 3)
    rig.now += 60
    task = await start_receive(rig, "a")
    assert rig.acked == [1, 2, 3]
    rig.deliver("a")
    assert await task == 4
    rig.check_nothing_left()


def test_group_message_expires_in_each_channel(rig: Rig) -> None:
    rig.join("g", "a", "b", "c")
    rig.deliver(group="g")
    rig.take("b")
    rig.wait_and_tick(60)
    assert sorted(rig.reports) == [("expired", "a"), ("expired", "c")]
    assert rig.acked == [1]
    rig.check_nothing_left()


async def test_tick_is_wanted_only_while_something_is_held(rig: Rig) -> None:
    task = await start_receive(rig, "idle")
    assert rig.router.next_tick_at() is None
    assert rig.router.tick() is None
    rig.deliver("a")
    assert rig.router.next_tick_at() == rig.now + TICK_INTERVAL
    rig.now += 0.1
    rig.deliver("a")
    rig.deliver("b")
    assert rig.router.next_tick_at() == rig.now - 0.1 + TICK_INTERVAL
    rig.now += TICK_INTERVAL
    assert rig.router.tick() == rig.router.next_tick_at() == rig.now + TICK_INTERVAL
    rig.take_all("a", 2)
    rig.take("b")
    assert rig.router.next_tick_at() is None
    assert rig.router.tick() is None
    rig.now += 5
    rig.deliver("a")
    assert rig.router.next_tick_at() == rig.now + TICK_INTERVAL
    rig.take("a")
    task.cancel()
    await let_run()
    rig.check_nothing_left()


# Stalled channels


async def stall(rig: Rig, channel: str = "stuck", count: int = 5) -> asyncio.Task[int]:
    """Have ``channel`` stalled with ``count`` messages; returns the receive() that waits."""
    waiting = await start_receive(rig, "eager")
    rig.fill(channel, count)
    rig.wait_and_tick(1.1)
    assert rig.router.stalled_channels == 1
    return waiting


async def test_stuck_channel_stops_counting(rig: Rig) -> None:
    await stall(rig)
    assert rig.router.in_use == 0
    assert rig.acked == [1, 2, 3, 4, 5]
    assert rig.router.waiting_messages == 5
    rig.check_books()
    assert rig.take_all("stuck", 5) == [1, 2, 3, 4, 5]
    assert rig.acked == [1, 2, 3, 4, 5]
    assert rig.reports == []
    rig.check_books()


class Acker:
    def __init__(self, acked: list[int]) -> None:
        self.ack = acked.append


async def test_what_a_stalled_channel_holds_keeps_no_acker(rig: Rig) -> None:
    """That belongs to a connection, which may be gone long before the message."""
    acker = Acker(rig.acked)
    forgotten = weakref.ref(acker)
    await start_receive(rig, "eager")
    rig.router.deliver(cast(Envelope, FakeEnvelope(0, channel="stuck")), 0, acker)
    del acker
    rig.fill("stuck", 4)
    rig.wait_and_tick(1.1)
    assert rig.acked == [0, 1, 2, 3, 4]
    gc.collect()
    assert forgotten() is None


async def test_not_stalled_within_a_second(rig: Rig) -> None:
    await start_receive(rig, "eager")
    rig.fill("stuck", 5)
    rig.wait_and_tick(1.0)
    assert rig.router.stalled_channels == 0
    assert rig.acked == []


async def test_not_stalled_if_its_messages_are_young(rig: Rig) -> None:
    await start_receive(rig, "eager")
    rig.fill("stuck", 1)
    rig.now += 59.9
    rig.fill("stuck", 5)
    rig.wait_and_tick(0.2)
    assert rig.reports == [("expired", "stuck")]
    assert rig.router.stalled_channels == 0


async def test_not_stalled_if_receive_was_called_lately(rig: Rig) -> None:
    await start_receive(rig, "eager")
    rig.fill("slow", 6)
    rig.now += 0.9
    rig.take("slow")
    rig.wait_and_tick(0.9)
    assert rig.router.stalled_channels == 0
    rig.wait_and_tick(0.2)
    assert rig.router.stalled_channels == 1


async def test_not_stalled_when_a_waiting_receive_got_a_message_lately(rig: Rig) -> None:
    """It waited for long, and took one of a burst: its handler has run for half a second."""
    await start_receive(rig, "eager")
    slow = await start_receive(rig, "slow")
    rig.now += 100
    rig.fill("slow", 6)
    rig.now += 0.7
    await slow
    rig.wait_and_tick(0.5)
    assert rig.router.stalled_channels == 0


async def test_not_stalled_if_less_than_half_is_in_use(rig: Rig) -> None:
    await start_receive(rig, "eager")
    rig.fill("stuck", 4)
    rig.wait_and_tick(1.1)
    assert rig.router.stalled_channels == 0
    rig.deliver("other")
    rig.router.tick()
    assert rig.router.stalled_channels == 1
    assert rig.acked == [1, 2, 3, 4]


async def test_not_stalled_if_nobody_waits(rig: Rig) -> None:
    rig.fill("stuck", 5)
    rig.wait_and_tick(1.1)
    assert rig.router.stalled_channels == 0
    await start_receive(rig, "eager")
    rig.router.tick()
    assert rig.router.stalled_channels == 1


async def test_receivers_that_ended_do_not_wait(rig: Rig) -> None:
    woken, cancelled = await start_receive(rig, "eager"), await start_receive(rig, "eager")
    rig.deliver("eager")
    cancelled.cancel()
    await let_run()
    assert await woken == 1
    rig.fill("stuck", 5)
    rig.wait_and_tick(1.1)
    assert rig.router.stalled_channels == 0


async def test_not_stalled_while_someone_receives(rig: Rig) -> None:
    """A receiver that is woken and has not run yet, or was woken in vain, is a reader."""
    await start_receive(rig, "eager")
    await start_receive(rig, "a")
    rig.fill("a", 5)
    rig.wait_and_tick(1.1)
    assert rig.router.stalled_channels == 0


async def test_what_arrives_for_a_stalled_channel_does_not_count_until_it_receives(
    rig: Rig,
) -> None:
    await stall(rig)
    rig.deliver("stuck")
    assert rig.acked[-1] == 6
    assert rig.router.in_use == 0
    assert rig.take("stuck") == 1
    assert rig.router.stalled_channels == 0
    rig.deliver("stuck")
    assert rig.router.in_use == 1
    assert rig.acked[-1] == 6
    assert rig.take_all("stuck", 6) == [2, 3, 4, 5, 6, 7]
    assert rig.acked == [1, 2, 3, 4, 5, 6, 7]
    rig.check_books()


async def test_receive_that_is_cancelled_at_once_ends_the_stall(rig: Rig) -> None:
    """The consumer has come back, whatever happens to this call."""
    await stall(rig, count=5)
    rig.wait_and_tick(60)
    task = await start_receive(rig, "stuck")
    task.cancel()
    await let_run()
    rig.deliver("stuck")
    assert rig.router.in_use == 1


async def test_group_message_counts_for_the_members_that_are_not_stalled(rig: Rig) -> None:
    await stall(rig)
    rig.join("g", "stuck", "a")
    rig.deliver(group="g")
    assert rig.router.in_use == 1
    assert rig.take("a") == 6
    assert rig.acked[-1] == 6
    rig.check_books()
    assert rig.take_all("stuck", 6) == [1, 2, 3, 4, 5, 6]
    assert len(rig.acked) == 6


async def test_group_message_held_by_a_channel_that_stalls_still_counts_for_others(
    rig: Rig,
) -> None:
    rig.join("g", "stuck", "slow")
    await start_receive(rig, "eager")
    for _ in range(6):
        rig.deliver(group="g")
    rig.now += 1
    rig.take("slow")
    rig.wait_and_tick(0.1)
    assert rig.router.stalled_channels == 1
    assert rig.acked == [1]
    assert rig.router.in_use == 5
    rig.check_books()
    rig.take_all("slow", 5)
    assert rig.acked == [1, 2, 3, 4, 5, 6]
    assert rig.take_all("stuck", 6) == [1, 2, 3, 4, 5, 6]


async def test_group_message_for_stalled_members_only_is_acked_at_once(rig: Rig) -> None:
    await stall(rig)
    rig.join("g", "stuck")
    rig.deliver(group="g")
    assert rig.acked[-1] == 6
    assert rig.counters.unwanted == 0
    assert rig.take_all("stuck", 6)[-1] == 6


async def test_stalled_channel_keeps_its_capacity_and_drops_the_oldest(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(channel_capacity={"stuck": 3})
    await stall(rig)
    assert rig.reports == [("overflowed", "stuck")] * 2
    rig.deliver("stuck")
    assert rig.counters.overflowed == 3
    assert rig.router.waiting_messages == 3
    rig.check_books()
    assert rig.take_all("stuck", 3) == [4, 5, 6]


async def test_what_a_stalled_channel_kept_is_bounded_when_it_stalls_again(
    make_rig: Callable[..., Rig],
) -> None:
    """It came back once, got more, and is stuck again."""
    rig = make_rig(channel_capacity={"stuck": 3})
    await stall(rig)  # It keeps 3, 4, 5.
    rig.take("stuck")
    rig.fill("stuck", 6)
    assert rig.counters.overflowed == 2
    rig.wait_and_tick(60 - 0.1)
    assert rig.router.stalled_channels == 1
    assert rig.take_all("stuck", 3) == [9, 10, 11]
    assert len(rig.acked) == 11
    rig.check_books()


async def test_channel_without_any_capacity_keeps_nothing(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(channel_capacity={"stuck": 0})
    await start_receive(rig, "eager")
    rig.fill("stuck", 5)
    rig.wait_and_tick(1.1)
    assert rig.counters.overflowed == 5
    assert rig.acked == [1, 2, 3, 4, 5]
    assert rig.router.waiting_messages == 0
    rig.check_books()


async def test_bodies_that_do_not_count_are_bounded_in_all(
    monkeypatch: pytest.MonkeyPatch, make_rig: Callable[..., Rig]
) -> None:
    """The oldest go first, from whatever channel; a group's body counts once."""
    monkeypatch.setattr(_router, "UNCOUNTED_BYTES", 100)
    rig = make_rig(local_capacity=10)
    rig.join("g", "a", "b")
    await start_receive(rig, "eager")
    rig.deliver("b", size=30)
    rig.deliver(group="g", size=30)
    rig.deliver("a", size=30)
    rig.fill("slow", 4)
    rig.wait_and_tick(1.1)
    assert rig.router.stalled_channels == 2  # Then less than half is in use.
    rig.check_books()
    rig.deliver("a", size=10)
    assert rig.counters.overflowed == 0  # 100 bytes: a body in two channels counts once.
    rig.deliver("a", size=1)
    assert rig.reports == [("overflowed", "b")]
    rig.deliver("a", size=40)
    assert sorted(rig.reports[1:]) == [("overflowed", "a"), ("overflowed", "b")]
    rig.check_books()
    assert rig.take_all("a", 4) == [3, 8, 9, 10]
    assert [box for box in rig.router._mailboxes if box == "b"] == []


def test_bodies_of_sixty_four_mebibytes_may_be_held_uncounted() -> None:
    assert _router.UNCOUNTED_BYTES == 64 * 1024 * 1024


async def test_many_stalled_channels_drop_in_the_order_of_arrival(
    monkeypatch: pytest.MonkeyPatch, make_rig: Callable[..., Rig]
) -> None:
    """However readers, ticks and stalls have shuffled what the router knows of ages."""
    monkeypatch.setattr(_router, "UNCOUNTED_BYTES", 200)
    rig = make_rig(local_capacity=1, local_expiry=1000.0)
    chance = random.Random(5)
    await start_receive(rig, "eager")
    channels = "abcdef"
    held: list[tuple[int, str]] = []
    rig.fill("busy", 3)  # Keeps the router full and is itself the youngest in the end.
    for channel in channels:
        held.append((rig.deliver(channel).number, channel))
    rig.router._mailboxes["busy"].patience = 1e9
    rig.wait_and_tick(1.1)
    assert rig.router.stalled_channels == len(channels)
    for _ in range(300):
        channel = chance.choice(channels)
        before = len(rig.reports)
        if chance.random() < 0.3 and any(c == channel for _, c in held):
            number = rig.take(channel)
            held.remove((number, channel))
            if any(c == channel for _, c in held):
                rig.router._stall(rig.router._mailboxes[channel])  # As if nothing had happened
        elif any(c == channel for _, c in held):
            held.append((rig.deliver(channel).number, channel))
            while len(held) > 20:
                _, oldest = held.pop(0)
                assert rig.reports[before] == ("overflowed", oldest)
                before += 1
        else:
            held.append((rig.deliver(channel).number, channel))
            rig.router._stall(rig.router._mailboxes[channel])
            if len(held) > 20:
                held.pop(0)
        if chance.random() < 0.1:
            rig.router.tick()
        rig.check_books()
    assert rig.counters.overflowed > 20


async def test_longest_silent_channel_is_stalled_first_and_no_more_than_needed(rig: Rig) -> None:
    await start_receive(rig, "eager")
    rig.fill("slow", 3)
    rig.fill("stuck", 3)
    rig.now += 0.5
    rig.take("slow")
    rig.wait_and_tick(1.1)
    assert rig.router._mailboxes["stuck"].stalled
    assert not rig.router._mailboxes["slow"].stalled
    assert rig.router.in_use == 2


async def test_slow_channel_gets_more_patience(rig: Rig) -> None:
    """Else its backlog would flow through memory and overflow unseen by its senders."""
    await stall(rig, "slow")
    rig.now += 0.9
    rig.take("slow")  # After 2 s of silence
    rig.fill("slow", 6)
    rig.wait_and_tick(3.9)
    assert rig.router.stalled_channels == 0
    rig.take("slow")
    rig.wait_and_tick(3.9)
    assert rig.router.stalled_channels == 0
    rig.wait_and_tick(0.2)
    assert rig.router.stalled_channels == 1


async def test_patience_has_a_limit(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(local_expiry=1000.0)
    await stall(rig)
    rig.now += 500
    rig.take("stuck")
    rig.fill("stuck", 5)
    rig.wait_and_tick(29.9)
    assert rig.router.stalled_channels == 0
    rig.wait_and_tick(0.2)
    assert rig.router.stalled_channels == 1


async def test_patience_ends_with_the_mailbox(rig: Rig) -> None:
    await stall(rig)
    rig.now += 20
    rig.take_all("stuck", 5)
    rig.fill("stuck", 5)
    rig.wait_and_tick(1.1)
    assert rig.router.stalled_channels == 1


async def test_messages_of_a_stalled_channel_expire_too(rig: Rig) -> None:
    await stall(rig)
    rig.wait_and_tick(59)
    assert rig.counters.expired == 5
    assert len(rig.acked) == 5
    rig.check_books()
    assert rig.router._uncounted_by_age == []


# A lost connection


async def test_lost_connection_keeps_messages_and_forgets_acks(rig: Rig) -> None:
    rig.join("g", "a", "b")
    rig.deliver("a")
    rig.deliver(group="g")
    rig.take("b")
    rig.router.connection_lost()
    assert rig.router.in_use == 0
    rig.check_books()
    rig.deliver("a")
    assert rig.router.in_use == 1
    assert rig.take_all("a", 3) == [1, 2, 3]
    assert rig.acked == [3]
    rig.check_nothing_left()


async def test_lost_connection_forgets_acks_of_what_expires_or_stalls_later(rig: Rig) -> None:
    rig.join("g", "stuck", "a")
    await start_receive(rig, "eager")
    rig.fill("stuck", 4)
    rig.deliver(group="g")
    rig.router.connection_lost()
    rig.fill("stuck", 6)
    rig.wait_and_tick(1.1)
    assert rig.router.stalled_channels == 1
    assert rig.acked == [6, 7, 8, 9, 10, 11]
    rig.wait_and_tick(60)
    assert rig.counters.expired == 12
    assert rig.acked == [6, 7, 8, 9, 10, 11]
    rig.check_books()


def test_lost_connections_pile_up_no_more_than_the_capacity() -> None:
    rig = Rig(capacity=3)
    for _ in range(5):
        rig.fill("a", 2)
        rig.router.connection_lost()
    assert rig.router.waiting_messages == 3
    assert rig.reports == [("overflowed", "a")] * 7
    assert rig.take_all("a", 3) == [8, 9, 10]
    rig.check_nothing_left()


def test_lost_connections_pile_up_no_more_than_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_router, "UNCOUNTED_BYTES", 30)
    rig = Rig()
    for channel in "abcd":
        rig.deliver(channel, size=10)
    rig.deliver("b", size=10)
    rig.router.connection_lost()
    assert rig.reports == [("overflowed", "a"), ("overflowed", "b")]
    assert [rig.take(channel) for channel in "cdb"] == [3, 4, 5]
    rig.check_nothing_left()


async def test_receivers_wait_through_a_lost_connection(rig: Rig) -> None:
    woken, waiting = await start_receive(rig, "a"), await start_receive(rig, "b")
    rig.deliver("a")
    rig.router.connection_lost()
    assert await woken == 1
    rig.deliver("b")
    assert await waiting == 2
    assert rig.acked == [2]
    rig.check_nothing_left()


async def test_receiver_woken_for_a_message_that_overflows_waits_on(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(capacity=0)
    task = await start_receive(rig, "a")
    rig.deliver("a")
    rig.router.connection_lost()
    assert rig.reports == [("overflowed", "a")]
    await let_run()
    assert not task.done()
    rig.deliver("a")
    assert await task == 2
    rig.check_nothing_left()


# For operators, and what it costs


def test_names_the_channels_that_hold_most(rig: Rig) -> None:
    for channel, count in (("a", 1), ("b", 3), ("c", 2)):
        rig.fill(channel, count)
    assert rig.router.fullest_channels(2) == [("b", 3), ("c", 2)]
    assert rig.router.fullest_channels() == [("b", 3), ("c", 2), ("a", 1)]
    rig.take("a")
    assert len(rig.router.fullest_channels()) == 2


async def test_repr_tells_the_state(rig: Rig) -> None:
    await stall(rig)
    rig.deliver("other")
    assert repr(rig.router) == (
        "<Router: in_use=1/10 messages=6 in 2 channels (1 stalled), lent=0, receivers waiting=1>"
    )
    rig.lend("other")
    assert repr(rig.router) == (
        "<Router: in_use=1/10 messages=5 in 1 channels (1 stalled), lent=1, receivers waiting=1>"
    )


async def test_idle_channels_have_no_containers(rig: Rig) -> None:
    """There may be 10,000 websockets, and two empty deques are 1.2 KiB."""
    task = await start_receive(rig, "a")
    (mailbox,) = rig.router._mailboxes.values()
    assert not hasattr(mailbox, "__dict__")
    containers = [
        getattr(mailbox, name)
        for name in Mailbox.__slots__
        if isinstance(getattr(mailbox, name), Iterable)
    ]
    assert containers == ["a", mailbox.waiter]  # The channel's name; a future counts as iterable.
    task.cancel()


# Whole sites, simulated


# Lending


def number_of(loan: Loan) -> int:
    return int(loan.message()["number"])


def test_a_loan_is_acked_when_it_is_taken(rig: Rig) -> None:
    rig.fill("a", 2)
    loan = rig.lend("a")
    assert number_of(loan) == 1
    assert (rig.acked, rig.router.in_use, rig.counters.received) == ([], 2, 0)
    rig.router.take(loan)
    assert (rig.acked, rig.router.in_use, rig.counters.received) == ([1], 1, 1)
    rig.check_books()
    assert rig.take("a") == 2
    rig.check_nothing_left()


def test_a_loan_is_given_back_to_the_front(rig: Rig) -> None:
    rig.fill("a", 2)
    loan = rig.lend("a")
    rig.deliver("a")
    rig.router.give_back(loan)
    rig.check_books()
    assert (rig.acked, rig.router.in_use) == ([], 3)
    assert rig.take_all("a", 3) == [1, 2, 3]
    rig.check_nothing_left()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_loans_are_given_back_in_their_order(rig: Rig, order: tuple[int, ...]) -> None:
    rig.fill("a", 4)
    loans = [rig.lend("a") for _ in range(3)]
    for index in order:
        rig.router.give_back(loans[index])
        rig.check_books()
    assert rig.take_all("a", 4) == [1, 2, 3, 4]


def test_a_loan_ends_once(rig: Rig) -> None:
    rig.fill("a", 2)
    loan = rig.lend("a")
    rig.router.give_back(loan)
    rig.router.give_back(loan)
    rig.router.take(loan)
    assert rig.acked == []
    loan = rig.lend("a")
    rig.router.take(loan)
    rig.router.take(loan)
    rig.router.give_back(loan)
    assert rig.acked == [1]
    assert rig.take("a") == 2
    rig.check_nothing_left()


@pytest.mark.parametrize("message", [{"type": "x"}, {"type": "x", "list": [1]}])
def test_who_comes_after_a_borrower_has_the_whole_message(
    rig: Rig, message: dict[str, Any]
) -> None:
    codec = MessageCodec(max_message_size=1000)
    rig.join("group", "a", "b")
    rig.router.deliver(codec.decode(codec.encode_for_group("group", message)), 1, rig)
    rig.router.deliver(codec.decode(codec.encode_for_channel("a", message)), 2, rig)
    for _ in range(2):
        loan = rig.lend("a")
        assert loan.message() == message
        rig.router.give_back(loan)
        received = rig.router.receive_nowait("a")
        assert received == message
        received.clear()
    assert rig.router.receive_nowait("b") == message
    rig.check_nothing_left()


async def test_lend_waits_for_a_message(rig: Rig) -> None:
    lending = await start_lend(rig, "a")
    rig.deliver("a")
    await let_run()
    assert number_of(lending.result()) == 1
    assert rig.acked == []
    rig.router.take(lending.result())
    assert rig.acked == [1]
    rig.check_nothing_left()


async def test_lend_waits_its_turn_among_receivers(rig: Rig) -> None:
    first = await start_receive(rig, "a")
    lending = await start_lend(rig, "a")
    third = await start_receive(rig, "a")
    rig.fill("a", 3)
    await let_run()
    assert (first.result(), number_of(lending.result()), third.result()) == (1, 2, 3)


@pytest.mark.parametrize("is_woken", [False, True])
async def test_a_cancelled_lend_leaves_the_message(rig: Rig, is_woken: bool) -> None:
    lending = await start_lend(rig, "a")
    if is_woken:
        rig.deliver("a")
    lending.cancel()
    await let_run()
    assert lending.cancelled()
    if not is_woken:
        rig.deliver("a")
    assert rig.take("a") == 1
    rig.check_nothing_left()


async def test_what_is_given_back_goes_to_whoever_waits(rig: Rig) -> None:
    rig.deliver("a")
    loan = rig.lend("a")
    receiving = await start_receive(rig, "a")
    rig.router.give_back(loan)
    await let_run()
    assert receiving.result() == 1
    rig.check_nothing_left()


def test_what_is_lent_and_given_back_is_ticked_for(rig: Rig) -> None:
    rig.deliver("a")
    asked_for = rig.router.next_tick_at()
    loan = rig.lend("a")
    assert rig.router.next_tick_at() == asked_for == rig.now + TICK_INTERVAL
    assert not rig.router.idle
    rig.now += TICK_INTERVAL
    assert rig.router.tick() == rig.router.next_tick_at() == rig.now + TICK_INTERVAL
    rig.router.give_back(loan)
    assert rig.router.next_tick_at() == rig.now + TICK_INTERVAL
    rig.wait_and_tick(60)
    assert rig.reports == [("expired", "a")]
    assert rig.acked == [1]
    rig.check_nothing_left()


async def test_lend_passes_over_what_has_expired(rig: Rig) -> None:
    rig.deliver("a")
    rig.now += 60
    lending = await start_lend(rig, "a")
    assert rig.reports == [("expired", "a")]
    rig.deliver("a")
    await let_run()
    assert number_of(lending.result()) == 2


def test_a_group_message_is_acked_when_the_last_member_has_it_lent_or_not(rig: Rig) -> None:
    rig.join("g", "a", "b")
    rig.deliver(group="g")
    loan = rig.lend("a")
    assert rig.take("b") == 1
    assert (rig.acked, rig.router.in_use) == ([], 1)
    rig.router.give_back(loan)
    rig.check_books()
    rig.router.take(rig.lend("a"))
    assert rig.acked == [1]
    rig.check_nothing_left()


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_lost_connection_forgets_the_acks_of_loans(rig: Rig, is_taken: bool) -> None:
    rig.fill("a", 2)
    loan = rig.lend("a")
    rig.router.connection_lost()
    assert rig.router.in_use == 0
    rig.deliver("a")
    if is_taken:
        rig.router.take(loan)
    else:
        rig.router.give_back(loan)
    rig.check_books()
    assert rig.take_all("a", 2 if is_taken else 3) == ([2, 3] if is_taken else [1, 2, 3])
    assert rig.acked == [3]
    rig.check_nothing_left()


async def test_a_loan_comes_back_to_a_channel_that_has_stalled(rig: Rig) -> None:
    rig.fill("a", 9)
    taken, given_back = rig.lend("a"), rig.lend("a")
    await start_receive(rig, "b")
    rig.wait_and_tick(1.5)
    assert rig.router.stalled_channels == 1
    assert rig.acked == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    rig.router.give_back(given_back)
    rig.check_books()
    rig.router.take(taken)
    assert rig.router.in_use == 0
    assert rig.take_all("a", 8) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert len(rig.acked) == 9


async def test_a_loan_that_still_counts_comes_back_to_a_channel_that_has_stalled(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(local_capacity=4)
    lending = [await start_lend(rig, "a") for _ in range(2)]
    receiving = await start_receive(rig, "a")

    def clock() -> float:
        rig.now += 0.125
        return rig.now

    with monkeypatch.context() as patch:
        patch.setattr(rig.router, "_clock", clock)
        rig.fill("a", 2)
        await let_run()
    older, newer = (task.result() for task in lending)  # lent a moment after the last reader came
    rig.router.give_back(older)
    receiving.cancel()
    await start_receive(rig, "b")
    rig.wait_and_tick(1)
    assert (rig.router.stalled_channels, newer.counts) == (1, True)
    rig.router.give_back(newer)
    assert rig.router.in_use == 0, "there it doesn't count either"
    rig.deliver("a")
    rig.check_books()
    assert rig.take_all("a", 3) == [1, 2, 3]


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_loan_older_than_a_second_stops_counting(rig: Rig, is_taken: bool) -> None:
    rig.fill("a", 2)
    loan = rig.lend("a")
    rig.wait_and_tick(1)
    assert (rig.acked, rig.router.in_use) == ([], 2)
    rig.wait_and_tick(0.1)
    assert (rig.acked, rig.router.in_use) == ([1], 1)
    assert not rig.router.idle
    rig.check_books()
    if is_taken:
        rig.router.take(loan)
        assert (rig.acked, rig.counters.received) == ([1], 1)
        assert rig.take("a") == 2
    else:
        rig.router.give_back(loan)
        rig.check_books()
        assert rig.take_all("a", 2) == [1, 2]
    assert (rig.acked, rig.reports) == ([1, 2], [])
    rig.check_nothing_left()


def test_a_loan_of_a_group_message_stops_counting_for_its_own_channel(rig: Rig) -> None:
    rig.join("g", "a", "b")
    rig.deliver(group="g")
    rig.lend("a")
    rig.wait_and_tick(1.1)
    assert (rig.acked, rig.router.in_use) == ([], 1)
    rig.check_books()
    assert rig.take("b") == 1
    assert rig.acked == [1]


async def test_loans_to_a_loop_that_stands_still_hold_up_nobody(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(local_capacity=2)
    site = Site(rig, remote_capacity=10)
    lent = [await start_lend(rig, channel) for channel in "ab"]
    receiving = await start_receive(rig, "c")
    for channel in "abc":
        site.send(channel)
    await site.run(0.9, lambda: None)
    assert [number_of(lending.result()) for lending in lent] == [1, 2]
    assert not receiving.done(), "the broker may not send it yet"
    await site.run(0.5, lambda: None)
    assert receiving.result() == 3


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_loan_ends_by_itself_when_its_message_expires(rig: Rig, is_taken: bool) -> None:
    rig.deliver("a")
    rig.now += 30
    loan = rig.lend("a")
    rig.wait_and_tick(29.9)
    assert rig.reports == []
    rig.wait_and_tick(0.1)
    assert rig.reports == [("expired", "a")]
    rig.check_nothing_left()
    (rig.router.take if is_taken else rig.router.give_back)(loan)
    assert (rig.counters.received, rig.counters.expired) == (0, 1)
    assert (rig.acked, rig.reports) == ([1], [("expired", "a")])
    rig.check_nothing_left()


def test_a_loan_has_a_second_also_if_its_message_expires_before(rig: Rig) -> None:
    rig.fill("a", 2)
    rig.now += 59.9
    taken, given_back = rig.lend("a"), rig.lend("a")
    rig.wait_and_tick(0.9)
    assert rig.reports == []
    rig.router.take(taken)
    rig.router.give_back(given_back)
    rig.router.tick()
    assert (rig.counters.received, rig.reports) == (1, [("expired", "a")])
    assert rig.acked == [1, 2]
    rig.check_nothing_left()


def test_a_loan_that_lost_its_connection_expires_too(rig: Rig) -> None:
    rig.deliver("a")
    rig.lend("a")
    rig.router.connection_lost()
    rig.wait_and_tick(60)
    assert (rig.acked, rig.reports) == ([], [("expired", "a")])
    rig.check_nothing_left()


def test_what_is_given_back_can_be_the_oldest_of_too_many(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(capacity=2)
    rig.fill("a", 3)
    loan = rig.lend("a")
    rig.router.connection_lost()
    rig.router.give_back(loan)
    assert rig.reports == [("overflowed", "a")]
    rig.check_books()
    assert rig.take_all("a", 2) == [2, 3]
    rig.check_nothing_left()


def test_a_loan_that_does_not_count_comes_back_behind_one_that_does(rig: Rig) -> None:
    rig.fill("a", 2)
    counted = rig.lend("a")
    rig.router._stop_counting(rig.router._mailboxes["a"])
    uncounted = rig.lend("a")
    rig.router.give_back(counted)
    rig.router.give_back(uncounted)
    rig.check_books()
    assert rig.take_all("a", 2) == [1, 2]
    assert rig.acked == [2, 1]
    rig.check_nothing_left()


def test_what_does_not_count_comes_back_to_a_new_mailbox(rig: Rig) -> None:
    rig.deliver("a")
    rig.router.connection_lost()
    for _ in range(3):  # the former mailbox is gone each time, and known to the heap still
        rig.router.give_back(rig.lend("a"))
        rig.check_books()
    assert rig.take("a") == 1
    rig.check_nothing_left()


async def test_closing_ends_who_waits_for_a_loan_and_all_loans(rig: Rig) -> None:
    rig.deliver("a")
    loan = rig.lend("a")
    lending = await start_lend(rig, "a")
    rig.router.close()
    await let_run()
    with pytest.raises(StopConsumer):
        lending.result()
    with pytest.raises(StopConsumer):
        await rig.router.lend("a")
    rig.router.give_back(loan)
    rig.router.take(loan)
    assert rig.acked == []
    assert rig.router.idle


async def test_cancelled_receivers_leave_no_trace(rig: Rig) -> None:
    receiving = [await start_receive(rig, channel) for channel in "aab"]
    rig.router.cancel_receivers()
    await let_run()
    assert all(task.cancelled() for task in receiving)
    assert rig.router._waiting == 0


class Site:
    """Consumers on one router behind a broker that keeps what exceeds the prefetch count."""

    def __init__(self, rig: Rig, *, remote_capacity: int) -> None:
        self.rig = rig
        self.remote_capacity = remote_capacity
        self.queue: deque[str] = deque()
        self.refused = 0
        # When each message was sent, by its number; numbers are those of deliveries, in order.
        self.sent_at: deque[float] = deque()
        # Seconds from sending to receiving, for each message received
        self.latencies: dict[str, list[float]] = {}
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._sleepers_count = itertools.count()
        self._tick_at: float | None = None
        self._sent_at_by_number: dict[int, float] = {}
        self._delivered = 0

    def send(self, channel: str) -> None:
        if len(self.queue) < self.remote_capacity:
            self.queue.append(channel)
            self.sent_at.append(self.rig.now)
        else:
            self.refused += 1

    async def consume(self, channel: str, handle: Callable[[], Awaitable[None]]) -> None:
        latencies = self.latencies.setdefault(channel, [])
        while True:
            number = (await self.rig.router.receive(channel))["number"]
            latencies.append(self.rig.now - self._sent_at_by_number[number])
            await handle()

    async def sleep(self, seconds: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (self.rig.now + seconds, next(self._sleepers_count), waiter)
        heapq.heappush(self._sleepers, entry)
        await waiter

    async def run(self, seconds: float, send: Callable[[], None]) -> None:
        """Let time pass in steps of 50 ms; ``send`` is called in each."""
        for _ in range(round(seconds / 0.05)):
            self.rig.now += 0.05
            send()
            while self._sleepers and self._sleepers[0][0] <= self.rig.now:
                heapq.heappop(self._sleepers)[2].set_result(None)
            await let_run()
            while self._feed():
                await let_run()

    def _feed(self) -> bool:
        """What one turn of the event loop does: deliver up to the prefetch count; tick if due."""
        rig = self.rig
        fed = False
        while self.queue and self._delivered - len(rig.acked) < rig.local_capacity:
            self._delivered += 1
            envelope = rig.deliver(self.queue.popleft())
            self._sent_at_by_number[envelope.number] = self.sent_at.popleft()
            fed = True
        if self._tick_at is None:
            self._tick_at = rig.router.next_tick_at()
        if self._tick_at is not None and self._tick_at <= rig.now:
            self._tick_at = rig.router.tick()
            fed = True
        return fed


async def test_few_stuck_consumers_cost_the_others_nothing() -> None:
    """Fault 3 of the old layer: one unread channel held up every websocket of its process."""
    rig = Rig(local_capacity=20, capacity=10)
    site = Site(rig, remote_capacity=20)
    channels = [f"c{n}" for n in range(40)]
    stuck, healthy = channels[:5], channels[5:]

    async def handle() -> None:
        await site.sleep(0.1)

    consumers = [asyncio.create_task(site.consume(channel, handle)) for channel in healthy]
    turn = itertools.cycle(channels)

    def send() -> None:
        for _ in range(4):  # 80 messages a second, 10 of them for the stuck
            site.send(next(turn))

    await site.run(5, send)
    for latencies in site.latencies.values():
        latencies.clear()
    refused = site.refused
    await site.run(20, send)
    assert site.refused == refused
    assert rig.counters.received > 1000
    assert max(itertools.chain(*site.latencies.values())) <= 0.11
    assert {channel for _, channel in rig.reports} == set(stuck)
    assert rig.router.stalled_channels > 0
    for consumer in consumers:
        consumer.cancel()
    await let_run()


async def test_overload_of_all_drops_nothing_silently() -> None:
    """Each consumer gets ten times what it can handle: its senders see ChannelFull."""
    rig = Rig(local_capacity=20, capacity=20)
    site = Site(rig, remote_capacity=20)
    channels = [f"c{n}" for n in range(40)]
    chance = random.Random(3)

    async def handle() -> None:
        await site.sleep(chance.uniform(1, 3))

    consumers = [asyncio.create_task(site.consume(channel, handle)) for channel in channels]

    def send() -> None:
        for _ in range(10):  # 200 messages a second for 40 consumers that handle 20
            site.send(chance.choice(channels))

    await site.run(30, send)
    assert rig.reports == []
    assert site.refused > 4000
    assert rig.counters.received > 300
    for consumer in consumers:
        consumer.cancel()
    await let_run()


# Any interleaving

CHANNELS = st.sampled_from("abcd")
GROUPS = st.sampled_from("gh")


class RouterMachine(RuleBasedStateMachine):
    """Deliveries within the prefetch count, receivers that come, are cancelled and run, loans,
    time, members that join and leave, lost connections; steps of the event loop are rules too."""

    CAPACITY = 3
    LOCAL_CAPACITY = 6
    LOCAL_EXPIRY = 10.0
    UNCOUNTED_BYTES = 60

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(_router, "UNCOUNTED_BYTES", self.UNCOUNTED_BYTES)
        self.rig = Rig(
            local_capacity=self.LOCAL_CAPACITY,
            local_expiry=self.LOCAL_EXPIRY,
            capacity=self.CAPACITY,
        )
        self.tasks: list[asyncio.Task[None]] = []
        # What the broker has to get back from this connection, and what nobody may ack any more
        self.unacked: set[int] = set()
        self.lost: set[int] = set()
        self.acks_seen = 0
        # Numbers addressed to each channel, in order, and those that it received
        self.addressed: dict[str, list[int]] = {channel: [] for channel in "abcd"}
        self.received: dict[str, list[int]] = {channel: [] for channel in "abcd"}
        # What is lent, as its receivers know it, and since when; those loans that a tick has
        # ended; and the numbers that were lent: they may have been overtaken.
        self.loans: dict[Loan, float] = {}
        self.ended: set[Loan] = set()
        self.borrowed: dict[str, set[int]] = {channel: set() for channel in "abcd"}
        self.arrived_at: dict[int, float] = {}
        self.unwanted = 0
        self.rig.join("g", "a", "b", "c")

    async def consume(self, channel: str) -> None:
        number = (await self.rig.router.receive(channel))["number"]
        assert number in self.addressed[channel]
        assert self.rig.now < self.arrived_at[number] + self.LOCAL_EXPIRY
        self.received[channel].append(number)

    async def borrow(self, channel: str) -> None:
        loan = await self.rig.router.lend(channel)
        number = loan.message()["number"]
        assert number in self.addressed[channel]
        assert self.rig.now < self.arrived_at[number] + self.LOCAL_EXPIRY
        self.loans[loan] = self.rig.now
        self.borrowed[channel].add(number)

    def step(self) -> None:
        """One turn of the event loop: what is ready runs, what it makes ready does not."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def collect_acks(self) -> None:
        for number in self.rig.acked[self.acks_seen :]:
            assert number in self.unacked, "acked twice, or after its connection was lost"
            self.unacked.discard(number)
        self.acks_seen = len(self.rig.acked)

    def delivered(self, envelope: FakeEnvelope, channels: list[str]) -> None:
        self.unacked.add(envelope.number)
        self.arrived_at[envelope.number] = self.rig.now
        for channel in channels:
            self.addressed[channel].append(envelope.number)

    @rule(
        recipients=st.lists(st.one_of(CHANNELS, GROUPS), min_size=1, max_size=6),
        size=st.sampled_from([0, 1, 10, 25]),
    )
    def deliver(self, recipients: list[str], size: int) -> None:
        """A burst of the broker, which sends no more than the prefetch count allows."""
        for recipient in recipients:
            if len(self.unacked) == self.LOCAL_CAPACITY:
                break
            if recipient in "gh":
                channels = list(self.rig.members.channels(recipient))
                self.unwanted += not channels
                self.delivered(self.rig.deliver(group=recipient, size=size), channels)
            else:
                self.delivered(self.rig.deliver(recipient, size=size), [recipient])
            self.collect_acks()

    @rule(group=GROUPS, channel=CHANNELS)
    def join(self, group: str, channel: str) -> None:
        self.rig.join(group, channel)

    @rule(group=GROUPS, channel=CHANNELS)
    def leave(self, group: str, channel: str) -> None:
        self.rig.members.leave(group, channel)

    @rule(channels=st.lists(CHANNELS, min_size=1, max_size=4), run=st.booleans())
    def receive(self, channels: list[str], run: bool) -> None:
        for channel in channels:
            self.tasks.append(self.loop.create_task(self.consume(channel)))
        if run:
            self.step()

    @rule(channels=st.lists(CHANNELS, min_size=1, max_size=4), run=st.booleans())
    def lend(self, channels: list[str], run: bool) -> None:
        for channel in channels:
            self.tasks.append(self.loop.create_task(self.borrow(channel)))
        if run:
            self.step()

    @precondition(lambda self: self.loans)
    @rule(data=st.data(), is_taken=st.booleans())
    def end_loan(self, data: st.DataObject, is_taken: bool) -> None:
        loan = data.draw(st.sampled_from(list(self.loans)))
        del self.loans[loan]
        if is_taken:
            if loan not in self.ended:
                self.received[loan.channel].append(loan.message()["number"])
            self.rig.router.take(loan)
        else:
            self.rig.router.give_back(loan)

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        for task in data.draw(st.lists(st.sampled_from(self.tasks), min_size=1, max_size=3)):
            task.cancel()

    @rule()
    def run(self) -> None:
        self.step()
        self.drop_done()

    @rule(seconds=st.sampled_from([0.3, 1.1, 5.0]), tick=st.booleans())
    def wait(self, seconds: float, tick: bool) -> None:
        self.rig.now += seconds
        if tick:
            self.tick()

    def tick(self) -> None:
        counted = {loan for loan in self.loans if loan.counts}
        self.rig.router.tick()
        for loan, lent_at in self.loans.items():
            if self.rig.now - lent_at < 1.01:  # it's either less or rather more
                assert loan.counts == (loan in counted)
                continue
            assert not loan.counts
            if self.arrived_at[loan.message()["number"]] + self.LOCAL_EXPIRY <= self.rig.now:
                self.ended.add(loan)

    @rule(eager=CHANNELS, stuck=CHANNELS, count=st.integers(3, 6))
    def get_stuck(self, eager: str, stuck: str, count: int) -> None:
        """One receives and another doesn't: chance alone stalls a channel too seldom."""
        self.receive([eager], run=True)
        self.deliver([stuck] * count, size=10)
        self.wait(1.1, tick=True)

    @rule()
    def lose_connection(self) -> None:
        self.collect_acks()
        self.lost |= self.unacked
        self.unacked.clear()
        self.rig.router.connection_lost()
        assert self.rig.router.in_use == 0

    @rule()
    def come_to_rest(self) -> None:
        """Then nobody waits on a channel that has a message."""
        for _ in range(30):
            self.step()
        self.drop_done()
        router = self.rig.router
        for mailbox in router._mailboxes.values():
            assert not mailbox.woken
            assert mailbox.messages is None or mailbox.waiter is None
        waiting = {id(box): box for box in router._mailboxes.values() if box.waiter}
        assert len(waiting) <= len(self.tasks)
        assert router._waiting == len(self.tasks)

    def drop_done(self) -> None:
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.result()
        self.tasks = [task for task in self.tasks if not task.done()]

    @invariant()
    def it_asks_for_a_tick(self) -> None:
        router = self.rig.router
        assert (router.next_tick_at() is not None) == bool(router._holding or router._loans)
        assert set(router._loans) == self.loans.keys() - self.ended

    @invariant()
    def books_are_right(self) -> None:
        self.collect_acks()
        assert self.rig.router.in_use == len(self.unacked) <= self.LOCAL_CAPACITY
        self.rig.check_books()
        assert self.rig.router._uncounted_bytes <= self.UNCOUNTED_BYTES
        for mailbox in self.rig.router._mailboxes.values():
            assert mailbox.uncounted <= self.CAPACITY

    @invariant()
    def every_message_is_accounted_for(self) -> None:
        counters = self.rig.counters
        assert counters.received == sum(map(len, self.received.values()))
        assert counters.expired == sum(reason == "expired" for reason, _ in self.rig.reports)
        assert counters.overflowed == sum(reason == "overflowed" for reason, _ in self.rig.reports)
        assert counters.unwanted == self.unwanted
        dropped = Counter(channel for _, channel in self.rig.reports)
        for channel in "abcd":
            mailbox = self.rig.router._mailboxes.get(channel)
            held = 0 if mailbox is None else len(mailbox.messages or ())
            lent = sum(loan.channel == channel for loan in self.loans.keys() - self.ended)
            ended = len(self.received[channel]) + dropped[channel]
            assert len(self.addressed[channel]) == ended + held + lent

    @invariant()
    def channels_are_in_order(self) -> None:
        for channel, received in self.received.items():
            # For what nobody had borrowed; the mailboxes' order is looked at with the books.
            in_order = [number for number in received if number not in self.borrowed[channel]]
            assert all(earlier < later for earlier, later in itertools.pairwise(in_order))

    def teardown(self) -> None:
        try:
            self.come_to_rest()
            for task in self.tasks:
                task.cancel()
            self.come_to_rest()
            assert not self.tasks
            self.wait(self.LOCAL_EXPIRY, tick=True)  # This ends all loans too.
            self.rig.check_nothing_left()
            for loan in self.loans:
                self.rig.router.give_back(loan)
            self.rig.check_nothing_left()
            self.books_are_right()
            assert not self.unacked
            assert not self.lost & set(self.rig.acked)
        finally:
            self.patch.undo()
            self.loop.close()


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(stateful_step_count=50)
