"""Mailboxes, receivers, acks, relief, handing over: rules without a broker, time by hand."""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import random
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, cast

import pytest
from channels.exceptions import StopConsumer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from channels_rabbitmq._codec import Envelope, MessageCodec
from channels_rabbitmq._inbox import relief as _relief
from channels_rabbitmq._inbox.accounting import MESSAGE_OVERHEAD
from channels_rabbitmq._inbox.ages import Ages
from channels_rabbitmq._inbox.hand_overs import HandedOver
from channels_rabbitmq._inbox.mailbox import Mailbox
from channels_rabbitmq._inbox.mailboxes import Mailboxes
from channels_rabbitmq._inbox.members import Members
from channels_rabbitmq._inbox.router import BEHIND, TICK_INTERVAL, Router
from channels_rabbitmq._windows import WINDOW
from channels_rabbitmq.statistics import Counters


class FakeEnvelope:
    """What the router uses of an envelope. The message holds a number to know it by."""

    flat = None

    def __init__(
        self, number: int, *, channel: str | None = None, group: str | None = None, size: int = 10
    ) -> None:
        self.number = number
        self.channel = channel
        self.group = group
        self.size = size
        # How often a copy was made
        self.copies = 0

    def compact(self) -> None:
        """Nothing of it takes more than it has to."""

    def message(self) -> dict[str, Any]:
        self.copies += 1
        return {"number": self.number}


class Rig:
    """A router with a clock moved by hand and a feeder that knows what is acked.

    Half of its ``local_capacity`` is 5, a quarter 2. ``loop`` is the one that is running if it
    isn't given.
    """

    def __init__(
        self,
        *,
        local_capacity: int = 10,
        local_expiry: float = 60.0,
        capacity: int = 100,
        channel_capacity: dict[str, int] | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.now = 1000.0
        self.members = Members()
        self.counters = Counters()
        # (reason, channel) for each message dropped
        self.reports: list[tuple[str, str]] = []
        # (age, channel) for each message received that was the oldest of its time
        self.old: list[tuple[float, str]] = []
        # Numbers of the deliveries acked, in order
        self.acked: list[int] = []
        # The calls that start_receive() and start_hand_over() started
        self.tasks: list[asyncio.Task[Any]] = []
        self.numbers = itertools.count(1)
        self.local_capacity = local_capacity
        self.ages = Ages(warn_above=0, report=lambda age, channel: self.old.append((age, channel)))
        capacities = channel_capacity or {}
        self.router = Router(
            members=self.members,
            local_capacity=local_capacity,
            local_expiry=local_expiry,
            capacity_of=lambda channel: capacities.get(channel, capacity),
            counters=self.counters,
            ages=self.ages,
            report=lambda reason, channel: self.reports.append((reason, channel)),
            clock=lambda: self.now,
            create_future=lambda: (loop or asyncio.get_running_loop()).create_future(),
            call_soon=lambda callback: (loop or asyncio.get_running_loop()).call_soon(callback),
        )

    def join(self, group: str, *channels: str) -> None:
        for channel in channels:
            self.members.finish_add(self.members.add(group, channel), True)

    def deliver(
        self,
        channel: str | None = None,
        *,
        group: str | None = None,
        size: int = 10,
        age: float = 0.0,
    ) -> FakeEnvelope:
        envelope = FakeEnvelope(next(self.numbers), channel=channel, group=group, size=size)
        self.router.deliver(cast(Envelope, envelope), envelope.number, self, age)
        return envelope

    def ack(self, delivery_tag: int) -> None:
        self.acked.append(delivery_tag)

    def fill(self, channel: str, count: int) -> None:
        for _ in range(count):
            self.deliver(channel)

    def take(self, channel: str) -> int:
        """What ``receive()`` returns without waiting; fails if it would wait."""
        return int(result_of(self.router.receive(channel))["number"])

    def take_all(self, channel: str, count: int) -> list[int]:
        return [self.take(channel) for _ in range(count)]

    def hand_over(self, channel: str) -> HandedOver:
        """What ``hand_over()`` returns without waiting; fails if it would wait."""
        return result_of(self.router.hand_overs.hand_over(channel))

    def wait_and_tick(self, seconds: float) -> None:
        self.now += seconds
        self.router.tick()

    @property
    def mailboxes(self) -> Mailboxes:
        return self.router._mailboxes

    @property
    def handed_over(self) -> set[HandedOver]:
        return self.router.hand_overs._pending

    def check_books(self) -> None:
        """Count everything anew and compare with what the router keeps."""
        router = self.router
        mailboxes = self.mailboxes.by_channel
        held = [(box, d, i) for box in mailboxes.values() for i, d in enumerate(box.messages())]
        # The early acked of a mailbox are its oldest.
        unacked = Counter(d for box, d, i in held if i >= box.early_acked)
        early_acked = Counter(d for box, d, i in held if i < box.early_acked)
        handed_over = [each.delivery for each in self.handed_over]
        for delivery in [*(d for _, d, _ in held), *handed_over]:
            assert delivery.unacked == unacked[delivery]
            assert delivery.early_acked == early_acked[delivery]
            assert (delivery.acker is not None) == (delivery in unacked)
        assert router.unacked == len(unacked)
        assert router.buffered == len(held)
        assert len(router.hand_overs) == len(handed_over)
        sizes = [delivery.envelope.size + MESSAGE_OVERHEAD for delivery in early_acked]
        assert router.early_acked_bytes == sum(sizes)
        assert router.stalled_channels == sum(box.early_acked > 0 for box in mailboxes.values())
        assert set(self.mailboxes.holding) == {box for box in mailboxes.values() if box.size}
        assert router.channels == sum(not box.is_idle for box in mailboxes.values())
        assert [box for box in mailboxes.values() if box.is_idle] in (
            [],
            [self.mailboxes._just_idle],
        )
        for channel, box in mailboxes.items():
            assert box.channel == channel
            assert box.rest is None or (box.rest and box.first is not None)
            assert 0 <= box.early_acked <= box.size
            assert box.reserved >= 0
            numbers = [delivery.number for delivery in box.messages()]
            assert numbers == sorted(numbers)

    def check_nothing_left(self) -> None:
        self.router.tick()
        self.check_books()
        router = self.router
        assert router.idle
        assert not router.holds_messages
        assert router.unacked == router.buffered == len(router.hand_overs) == 0
        assert router.channels == router.receivers == router.stalled_channels == 0
        assert router.early_acked_bytes == 0


def result_of(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        coroutine.send(None)
    except StopIteration as finished:
        return finished.value
    raise AssertionError("It waits")


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


async def start_hand_over(rig: Rig, channel: str) -> asyncio.Task[HandedOver]:
    """A ``hand_over()`` that is waiting now."""
    task = asyncio.create_task(rig.router.hand_overs.hand_over(channel))
    rig.tasks.append(task)
    await let_run()
    return task


# Deliveries


def test_message_waits_for_its_receiver(rig: Rig) -> None:
    rig.deliver("a")
    assert rig.router.unacked == 1
    assert rig.acked == []
    assert rig.take("a") == 1
    assert rig.acked == [1]
    assert rig.counters.consumed == 1
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
    assert rig.router.unacked == 1
    assert rig.router.buffered == 3
    rig.take("b")
    rig.take("a")
    assert rig.acked == []
    assert rig.router.unacked == 1
    rig.take("c")
    assert rig.acked == [1]
    assert rig.counters.consumed == 3
    rig.check_nothing_left()


def test_group_without_members_is_acked_at_once(rig: Rig) -> None:
    rig.deliver(group="g")
    assert rig.acked == [1]
    assert rig.counters.no_members == 1
    rig.check_nothing_left()


def test_each_receiver_has_its_copy_made_when_it_receives(rig: Rig) -> None:
    rig.join("g", "a", "b")
    envelope = rig.deliver(group="g")
    assert envelope.copies == 0
    rig.take("a")
    assert envelope.copies == 1
    rig.take("b")
    assert envelope.copies == 2


async def test_what_is_reserved_for_several_is_not_given_to_others(rig: Rig) -> None:
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


async def test_new_receiver_does_not_take_what_is_reserved_for_a_woken_one(rig: Rig) -> None:
    woken = await start_receive(rig, "a")
    rig.deliver("a")
    with pytest.raises(AssertionError, match="It waits"):
        rig.take("a")
    rig.fill("a", 2)
    assert rig.take("a") == 1  # Two of the three are not reserved; the next call takes the oldest.
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
    assert rig.router.buffered == 1
    rig.router.close()
    for receive in receives[1:]:
        receive.close()
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # Known; keeps the log clean.


async def test_a_channel_is_known_while_something_waits_in_it(rig: Rig) -> None:
    router = rig.router
    assert router.receive_nowait("a") is None
    assert "a" not in router.known_channels
    first, second = (asyncio.create_task(router.receive("a")) for _ in range(2))
    await asyncio.sleep(0)
    assert "a" in router.known_channels
    assert router.receivers == 2
    rig.deliver("a")
    assert router.receivers == 1
    rig.now += 60
    await asyncio.sleep(0)
    assert router.receivers == 2, "its message has expired, so the first one waits again"
    rig.fill("a", 2)
    assert (await first, await second) == ({"number": 2}, {"number": 3})
    rig.deliver("b")
    assert "b" in router.known_channels
    rig.take("b")
    rig.check_nothing_left()


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
    assert rig.counters.consumed > 1000
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


async def test_close_forgets_what_was_acked_early_and_relief_that_is_due(rig: Rig) -> None:
    await stall(rig)
    rig.fill("stuck", 5)
    rig.router.close()
    await let_run()
    assert rig.acked == [1, 2, 3, 4, 5]
    rig.check_nothing_left()


async def test_cancelled_receivers_do_not_wait_any_more(rig: Rig) -> None:
    receiving = [await start_receive(rig, channel) for channel in "aab"]
    rig.router.cancel_receivers()
    await let_run()
    assert all(task.cancelled() for task in receiving)
    assert rig.router.receivers == 0
    assert rig.router.idle


async def test_closed_router_ignores_what_still_comes(rig: Rig) -> None:
    rig.deliver("a")
    rig.router.close()
    rig.router.close()
    rig.deliver("a")
    rig.deliver(group="g")
    rig.router.connection_lost()
    rig.router.tick()
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
    assert rig.router.buffered == 3
    rig.wait_and_tick(0.1)
    assert rig.router.buffered == 1
    assert rig.acked == [1, 2]
    assert rig.counters.expired == 2
    assert rig.reports == [("expired", "a")] * 2
    rig.wait_and_tick(1)
    assert rig.acked == [1, 2, 3]
    assert rig.counters.consumed == 0
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
    assert not rig.router.holds_messages
    rig.fill("a", 2)
    rig.deliver("b")
    assert rig.router.holds_messages
    rig.take_all("a", 2)
    assert rig.router.holds_messages
    rig.take("b")
    assert not rig.router.holds_messages
    rig.deliver("a")
    assert rig.router.holds_messages
    rig.take("a")
    task.cancel()
    await let_run()
    rig.check_nothing_left()


# Relief


async def stall(rig: Rig, channel: str = "stuck", count: int = 5) -> asyncio.Task[int]:
    """Have ``channel`` stalled with ``count`` messages; returns the receive() that waits."""
    waiting = await start_receive(rig, "eager")
    rig.fill(channel, count)
    await let_run()
    assert rig.router.stalled_channels == 1
    return waiting


async def test_what_a_stuck_channel_holds_stops_counting_in_the_next_turn(rig: Rig) -> None:
    await start_receive(rig, "eager")
    rig.fill("stuck", 5)
    for _ in range(2):  # Those who were woken in this turn are to run first.
        assert (rig.router.stalled_channels, rig.acked) == (0, [])
        await asyncio.sleep(0)
    assert (rig.router.stalled_channels, rig.acked) == (1, [1, 2, 3, 4, 5])
    assert (rig.router.unacked, rig.router.buffered) == (0, 5)
    rig.check_books()
    assert rig.take_all("stuck", 5) == [1, 2, 3, 4, 5]
    assert (rig.acked, rig.reports) == ([1, 2, 3, 4, 5], [])
    rig.check_books()


async def test_burst_of_two_messages_each_relieves_none(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(local_capacity=100)
    received: list[int] = []

    async def consume(channel: str) -> None:
        while True:
            received.append((await rig.router.receive(channel))["number"])
            assert len(rig.acked) == len(received), "none was acked early"

    tasks = [asyncio.create_task(consume(f"c{n}")) for n in range(50)]
    await let_run()
    for n in range(50):
        rig.fill(f"c{n}", 2)
    await let_run()
    assert received == list(range(1, 101))
    assert not any(task.done() for task in tasks)  # else an assertion failed in there
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def test_nothing_is_left_when_all_has_expired(rig: Rig) -> None:
    rig.deliver("a")
    rig.now += 60
    assert rig.router.receive_nowait("a") is None
    assert rig.router.idle


async def test_no_relief_before_half_is_in_use(rig: Rig) -> None:
    await start_receive(rig, "eager")
    rig.fill("stuck", 4)
    await let_run()
    rig.router.tick()
    assert rig.acked == []
    rig.deliver("other")
    await let_run()
    assert rig.acked == [1, 2, 3, 4]


@pytest.mark.parametrize("start", [start_receive, start_hand_over])
async def test_no_relief_before_somebody_waits(
    rig: Rig, start: Callable[[Rig, str], Awaitable[object]]
) -> None:
    rig.fill("stuck", 10)
    await let_run()
    rig.router.tick()
    assert rig.acked == []
    await start(rig, "eager")
    assert len(rig.acked) == 10


async def test_receivers_that_ended_do_not_wait(rig: Rig) -> None:
    woken, cancelled = await start_receive(rig, "eager"), await start_receive(rig, "eager")
    rig.deliver("eager")
    assert await woken == 1
    cancelled.cancel()
    rig.fill("stuck", 5)  # It still seems to wait.
    await let_run()
    rig.fill("stuck", 5)
    await let_run()
    rig.router.tick()
    assert rig.acked == [1]


async def test_fullest_channel_is_relieved_first_and_no_more_than_needed(rig: Rig) -> None:
    await start_receive(rig, "eager")
    for channel, count in (("a", 2), ("b", 3), ("c", 5)):
        rig.fill(channel, count)
    await let_run()
    assert rig.acked == [6, 7, 8, 9, 10, 3, 4, 5]
    assert rig.router.unacked == 2, "a quarter of ten"
    rig.check_books()


@pytest.mark.parametrize(("local_capacity", "count"), [(1, 1), (2, 1), (3, 2), (4, 2), (7, 4)])
async def test_half_of_any_capacity(
    make_rig: Callable[..., Rig], local_capacity: int, count: int
) -> None:
    rig = make_rig(local_capacity=local_capacity)
    await start_receive(rig, "eager")
    rig.fill("stuck", count - 1)
    await let_run()
    assert rig.acked == []
    rig.deliver("stuck")
    await let_run()
    assert len(rig.acked) == count


async def test_what_woken_receivers_will_take_is_not_relieved(rig: Rig) -> None:
    await start_receive(rig, "eager")
    tasks = [await start_receive(rig, "a") for _ in range(6)]
    rig.fill("a", 6)
    rig.router.tick()  # Before they have run
    assert rig.acked == []
    rig.deliver("a")
    rig.router.tick()
    assert len(rig.acked) == 7
    assert [await task for task in tasks] == [1, 2, 3, 4, 5, 6]
    assert rig.take("a") == 7
    rig.check_books()


async def test_burst_to_channels_that_all_take_theirs_relieves_none(rig: Rig) -> None:
    received: list[int] = []

    async def consume(channel: str) -> None:
        received.append((await rig.router.receive(channel))["number"])
        assert rig.acked == received, "none was acked early"

    await start_receive(rig, "eager")
    rig.tasks += [asyncio.create_task(consume(channel)) for channel in "abcdefghij"]
    await let_run()
    for channel in "abcdefghij":
        rig.deliver(channel)
    await asyncio.gather(*rig.tasks[1:])
    assert received == list(range(1, 11))


async def test_what_arrives_after_relief_counts(rig: Rig) -> None:
    await stall(rig)
    rig.fill("stuck", 4)
    await let_run()
    rig.check_books()
    assert (rig.router.unacked, len(rig.acked)) == (4, 5)
    assert rig.take_all("stuck", 6) == [1, 2, 3, 4, 5, 6]
    assert (rig.acked, rig.router.stalled_channels) == ([1, 2, 3, 4, 5, 6], 0)
    rig.fill("stuck", 2)
    await let_run()
    assert rig.router.stalled_channels == 1, "half is in use again"
    assert rig.acked == list(range(1, 12))
    assert rig.take_all("stuck", 5) == [7, 8, 9, 10, 11]
    assert len(rig.acked) == 11
    rig.check_books()


async def test_emptied_channel_is_not_stalled(rig: Rig) -> None:
    await stall(rig)
    assert rig.router.early_acked_bytes == 5 * (10 + MESSAGE_OVERHEAD)
    rig.take_all("stuck", 5)
    assert (rig.router.stalled_channels, rig.router.early_acked_bytes) == (0, 0)
    rig.deliver("stuck")
    assert rig.router.unacked == 1
    rig.check_books()


class Acker:
    def __init__(self, acked: list[int]) -> None:
        self.ack = acked.append


async def test_what_was_acked_early_keeps_no_acker(rig: Rig) -> None:
    """That belongs to a connection, which may be gone long before the message."""
    acker = Acker(rig.acked)
    forgotten = weakref.ref(acker)
    await start_receive(rig, "eager")
    rig.router.deliver(cast(Envelope, FakeEnvelope(0, channel="stuck")), 0, acker)
    del acker
    rig.fill("stuck", 4)
    await let_run()
    assert rig.acked == [0, 1, 2, 3, 4]
    gc.collect()
    assert forgotten() is None


async def test_group_message_relieved_for_one_member_counts_for_the_others(rig: Rig) -> None:
    rig.join("g", "stuck", "slow")
    await start_receive(rig, "eager")
    rig.fill("stuck", 3)
    rig.deliver(group="g")
    rig.deliver(group="g")
    await let_run()
    assert (rig.acked, rig.router.unacked, rig.router.stalled_channels) == ([1, 2, 3], 2, 1)
    rig.check_books()
    assert rig.take("slow") == 4
    assert rig.acked == [1, 2, 3, 4]
    assert rig.take_all("stuck", 5) == [1, 2, 3, 4, 5]
    assert rig.acked == [1, 2, 3, 4]
    assert rig.take("slow") == 5
    assert rig.acked == [1, 2, 3, 4, 5]
    rig.check_books()


async def test_group_messages_hold_up_nobody_once_all_members_are_relieved(rig: Rig) -> None:
    rig.join("g", "a", "b")
    await start_receive(rig, "eager")
    for _ in range(5):
        rig.deliver(group="g")
    await let_run()
    assert (rig.acked, rig.router.stalled_channels) == ([1, 2, 3, 4, 5], 2)
    assert rig.router.early_acked_bytes == 5 * (10 + MESSAGE_OVERHEAD), "a body counts once"
    rig.check_books()
    assert rig.take_all("a", 5) == rig.take_all("b", 5) == [1, 2, 3, 4, 5]


async def test_what_is_acked_early_is_bounded_by_the_capacity(make_rig: Callable[..., Rig]) -> None:
    """What counts is not. The oldest go first."""
    rig = make_rig(channel_capacity={"stuck": 3})
    await stall(rig)
    assert rig.reports == [("overflowed", "stuck")] * 2
    rig.fill("stuck", 4)
    await let_run()
    assert rig.router.buffered == 7
    assert rig.take("stuck") == 3
    rig.deliver("stuck")
    await let_run()
    assert (rig.counters.overflowed, len(rig.reports)) == (6, 6)
    rig.check_books()
    assert rig.take_all("stuck", 3) == [8, 9, 10]
    assert rig.acked == list(range(1, 11))
    rig.check_books()


async def test_channel_without_any_capacity_keeps_nothing(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(channel_capacity={"stuck": 0})
    await start_receive(rig, "eager")
    rig.fill("stuck", 5)
    await let_run()
    assert rig.counters.overflowed == 5
    assert rig.acked == [1, 2, 3, 4, 5]
    assert (rig.router.buffered, rig.router.channels) == (0, 1)
    rig.check_books()


@pytest.fixture
def five_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much may be acked early if they have 10 bytes."""
    monkeypatch.setattr(_relief, "EARLY_ACKED_BYTES", 5 * (10 + MESSAGE_OVERHEAD))


@pytest.mark.usefixtures("five_messages")
async def test_bytes_acked_early_are_bounded_in_all(rig: Rig) -> None:
    """The fullest channel's oldest go first."""
    await start_receive(rig, "eager")
    rig.fill("a", 4)
    rig.fill("b", 5)
    rig.deliver("c")
    await let_run()
    dropped = [channel for _, channel in rig.reports]
    assert dropped == ["b", "a", "b", "a"], "from five and four to three and two"
    rig.check_books()
    rig.fill("c", 5)
    await let_run()
    assert Counter(channel for _, channel in rig.reports[4:]) == {"a": 1, "b": 1, "c": 4}
    rig.check_books()
    assert (rig.take("a"), rig.take_all("b", 2), rig.take_all("c", 2)) == (4, [8, 9], [14, 15])


@pytest.mark.usefixtures("five_messages")
async def test_body_in_two_channels_is_dropped_from_both(make_rig: Callable[..., Rig]) -> None:
    """Else it would take its memory still."""
    rig = make_rig(local_capacity=6)
    rig.join("g", "a", "b")
    await start_receive(rig, "eager")
    for _ in range(6):
        rig.deliver(group="g")
    await let_run()
    assert rig.reports == [("overflowed", "a"), ("overflowed", "b")]
    rig.check_books()
    assert rig.take_all("a", 5) == rig.take_all("b", 5) == [2, 3, 4, 5, 6]


@pytest.mark.usefixtures("five_messages")
async def test_large_message_takes_the_place_of_many(rig: Rig) -> None:
    await stall(rig, count=5)
    rig.fill("other", 4)
    rig.deliver("other", size=2 * (10 + MESSAGE_OVERHEAD))
    await let_run()
    rig.check_books()
    assert rig.take_all("stuck", 2) == [4, 5]
    assert rig.take("other") == 10


@pytest.mark.usefixtures("five_messages")
async def test_many_small_messages_do_not_pay_for_a_few_large_ones(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(local_capacity=8)
    await start_receive(rig, "eager")
    for _ in range(3):
        rig.deliver("video", size=3 * (10 + MESSAGE_OVERHEAD))
    rig.fill("user", 3)
    await let_run()
    rig.check_books()
    assert {channel for _, channel in rig.reports} == {"video"}
    assert rig.take_all("user", 3) == [4, 5, 6]


def test_sixty_four_mebibytes_may_be_acked_early() -> None:
    assert _relief.EARLY_ACKED_BYTES == 64 * 1024 * 1024


async def test_what_was_acked_early_expires(rig: Rig) -> None:
    await stall(rig)
    rig.now += 30
    rig.deliver("stuck")
    rig.wait_and_tick(30)
    assert rig.reports == [("expired", "stuck")] * 5
    assert (rig.router.stalled_channels, rig.router.unacked) == (0, 1)
    assert len(rig.acked) == 5
    rig.check_books()
    assert rig.take("stuck") == 6


async def test_tick_relieves_what_was_left_behind(make_rig: Callable[..., Rig]) -> None:
    """By a receiver that was woken and then cancelled."""
    rig = make_rig(local_capacity=2)
    await start_receive(rig, "eager")
    woken = rig.router.receive("a")
    woken.send(None)
    rig.deliver("a")
    await let_run()
    woken.close()
    await let_run()
    assert rig.acked == []
    rig.router.tick()
    assert rig.acked == [1]
    rig.check_books()


# A lost connection


async def test_lost_connection_keeps_messages_and_forgets_acks(rig: Rig) -> None:
    rig.join("g", "a", "b")
    rig.deliver("a")
    rig.deliver(group="g")
    rig.take("b")
    rig.router.connection_lost()
    assert rig.router.unacked == 0
    rig.check_books()
    rig.deliver("a")
    assert rig.router.unacked == 1
    assert rig.take_all("a", 3) == [1, 2, 3]
    assert rig.acked == [3]
    rig.check_nothing_left()


async def test_lost_connection_forgets_acks_of_what_is_relieved_or_expires_later(rig: Rig) -> None:
    rig.join("g", "stuck", "a")
    rig.fill("stuck", 4)
    rig.deliver(group="g")
    rig.router.connection_lost()
    assert rig.router.stalled_channels == 2
    await start_receive(rig, "eager")
    rig.fill("stuck", 5)
    await let_run()
    assert rig.acked == [6, 7, 8, 9, 10]
    rig.wait_and_tick(60)
    assert rig.counters.expired == 11
    assert rig.acked == [6, 7, 8, 9, 10]
    rig.check_books()


def test_lost_connections_pile_up_no_more_than_the_capacity() -> None:
    rig = Rig(capacity=3)
    for _ in range(5):
        rig.fill("a", 2)
        rig.router.connection_lost()
    assert rig.router.buffered == 3
    assert rig.reports == [("overflowed", "a")] * 7
    assert rig.take_all("a", 3) == [8, 9, 10]
    rig.check_nothing_left()


@pytest.mark.usefixtures("five_messages")
def test_lost_connections_pile_up_no_more_than_the_bytes(rig: Rig) -> None:
    for channel in "aabbb":
        rig.deliver(channel)
    rig.router.connection_lost()
    assert rig.reports == []
    rig.deliver("c")
    rig.router.connection_lost()
    assert rig.reports == [("overflowed", "b")]
    assert [rig.take(channel) for channel in "aabbc"] == [1, 2, 4, 5, 6]
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


# Handing over


def number_of(handed_over: HandedOver) -> int:
    return int(handed_over.message()["number"])


def test_what_is_handed_over_is_acked_and_received_when_it_is_accepted(rig: Rig) -> None:
    rig.fill("a", 2)
    handed_over = rig.hand_over("a")
    assert (number_of(handed_over), rig.acked, rig.router.unacked) == (1, [1], 1)
    assert (len(rig.router.hand_overs), rig.router.buffered) == (1, 1)
    assert rig.counters.consumed == 0
    rig.check_books()
    rig.router.hand_overs.accept(handed_over)
    assert (len(rig.router.hand_overs), rig.counters.consumed) == (0, 1)
    assert rig.take("a") == 2
    rig.check_nothing_left()


def test_what_is_requeued_goes_before_all_that_arrived_after_it(rig: Rig) -> None:
    rig.fill("a", 2)
    handed_over = rig.hand_over("a")
    rig.deliver("a")
    rig.router.hand_overs.requeue(handed_over)
    rig.check_books()
    assert (rig.router.unacked, rig.router.stalled_channels) == (2, 1)
    assert rig.take_all("a", 3) == [1, 2, 3]
    assert rig.acked == [1, 2, 3]
    rig.check_nothing_left()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_are_requeued_in_their_order(rig: Rig, order: tuple[int, ...]) -> None:
    rig.fill("a", 4)
    handed_over = [rig.hand_over("a") for _ in range(3)]
    for index in order:
        rig.router.hand_overs.requeue(handed_over[index])
        rig.check_books()
    assert rig.take_all("a", 4) == [1, 2, 3, 4]


def test_requeued_to_a_mailbox_that_is_gone(rig: Rig) -> None:
    rig.deliver("a")
    handed_over = rig.hand_over("a")
    assert (rig.router.channels, rig.router.holds_messages) == (0, False)
    assert not rig.router.idle
    rig.now += 5
    rig.router.hand_overs.requeue(handed_over)
    rig.check_books()
    assert rig.router.holds_messages
    assert rig.take("a") == 1
    rig.check_nothing_left()


async def test_requeued_while_others_have_been_acked_early(rig: Rig) -> None:
    rig.fill("a", 7)
    first, second, third = (rig.hand_over("a") for _ in range(3))
    rig.router.hand_overs.requeue(second)
    await stall(rig, "a", 1)
    assert rig.acked == [1, 2, 3, 4, 5, 6, 7, 8]
    rig.deliver("a")
    for handed_over in (third, first):
        rig.router.hand_overs.requeue(handed_over)
        rig.check_books()
    assert rig.router.unacked == 1
    assert rig.take_all("a", 9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert rig.acked == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    rig.check_books()


async def test_requeued_message_goes_to_a_receiver_that_waits(rig: Rig) -> None:
    rig.deliver("a")
    handed_over = rig.hand_over("a")
    receiving = await start_receive(rig, "a")
    rig.router.hand_overs.requeue(handed_over)
    assert await receiving == 1
    rig.check_nothing_left()


@pytest.mark.parametrize(("capacity", "kept"), [(2, [2, 3]), (0, [])])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_requeued_messages_are_bounded_by_the_capacity(
    make_rig: Callable[..., Rig], capacity: int, kept: list[int], order: tuple[int, ...]
) -> None:
    rig = make_rig(capacity=capacity)
    rig.fill("a", 4)
    handed_over = [rig.hand_over("a") for _ in range(3)]
    for index in order:
        rig.router.hand_overs.requeue(handed_over[index])
        rig.check_books()
    assert rig.reports == [("overflowed", "a")] * (3 - capacity)
    assert rig.take_all("a", len(kept) + 1) == [*kept, 4]
    rig.check_nothing_left()


@pytest.mark.usefixtures("five_messages")
def test_requeued_messages_are_bounded_by_the_bytes(rig: Rig) -> None:
    rig.fill("b", 3)
    rig.fill("a", 3)
    handed_over = [rig.hand_over(channel) for channel in "aaabbb"]
    for each in handed_over:
        rig.router.hand_overs.requeue(each)
        rig.check_books()
    assert rig.reports == [("overflowed", "a")]
    assert (rig.take_all("a", 2), rig.take_all("b", 3)) == ([5, 6], [1, 2, 3])
    rig.check_nothing_left()


def test_hand_over_ends_once(rig: Rig) -> None:
    rig.fill("a", 2)
    handed_over = rig.hand_over("a")
    rig.router.hand_overs.requeue(handed_over)
    rig.router.hand_overs.requeue(handed_over)
    rig.router.hand_overs.accept(handed_over)
    assert (rig.router.buffered, rig.counters.consumed) == (2, 0)
    handed_over = rig.hand_over("a")
    rig.router.hand_overs.accept(handed_over)
    rig.router.hand_overs.accept(handed_over)
    rig.router.hand_overs.requeue(handed_over)
    assert (rig.router.buffered, rig.counters.consumed) == (1, 1)
    assert rig.take("a") == 2
    assert rig.acked == [1, 2]
    rig.check_nothing_left()


@pytest.mark.parametrize("message", [{"type": "x"}, {"type": "x", "list": [1]}])
def test_the_receiver_after_a_requeue_has_the_whole_message(
    rig: Rig, message: dict[str, Any]
) -> None:
    codec = MessageCodec(max_message_size=1000)
    rig.join("group", "a", "b")
    rig.router.deliver(codec.decode(codec.encode_for_group("group", message)), 1, rig)
    rig.router.deliver(codec.decode(codec.encode_for_channel("a", message)), 2, rig)
    for _ in range(2):
        handed_over = rig.hand_over("a")
        assert handed_over.message() == message
        rig.router.hand_overs.requeue(handed_over)
        received = rig.router.receive_nowait("a")
        assert received == message
        received.clear()
    assert rig.router.receive_nowait("b") == message
    rig.check_nothing_left()


async def test_hand_over_waits_its_turn_among_receivers(rig: Rig) -> None:
    first = await start_receive(rig, "a")
    handing_over = await start_hand_over(rig, "a")
    third = await start_receive(rig, "a")
    rig.fill("a", 3)
    with pytest.raises(AssertionError, match="It waits"):
        rig.hand_over("a")
    assert (await first, number_of(await handing_over), await third) == (1, 2, 3)
    rig.router.hand_overs.accept(handing_over.result())
    rig.check_nothing_left()


@pytest.mark.parametrize("is_woken", [False, True])
async def test_cancelled_hand_over_leaves_the_message(rig: Rig, is_woken: bool) -> None:
    handing_over = await start_hand_over(rig, "a")
    if is_woken:
        rig.deliver("a")
    handing_over.cancel()
    await let_run()
    assert handing_over.cancelled()
    if not is_woken:
        rig.deliver("a")
    assert rig.acked == []
    assert rig.take("a") == 1
    rig.check_nothing_left()


async def test_hand_over_passes_over_what_has_expired(rig: Rig) -> None:
    rig.deliver("a")
    rig.now += 60
    handing_over = await start_hand_over(rig, "a")
    assert rig.reports == [("expired", "a")]
    rig.deliver("a")
    assert number_of(await handing_over) == 2


def test_what_is_handed_over_does_not_expire(rig: Rig) -> None:
    """Its receiver may have taken it long ago and be slow to say so."""
    rig.deliver("a")
    handed_over = rig.hand_over("a")
    rig.wait_and_tick(60)
    rig.router.hand_overs.accept(handed_over)
    assert (rig.counters.consumed, rig.reports) == (1, [])
    rig.check_nothing_left()


def test_requeued_message_that_has_expired_is_dropped_at_the_next_tick(rig: Rig) -> None:
    rig.deliver("a")
    handed_over = rig.hand_over("a")
    rig.now += 60
    rig.router.hand_overs.requeue(handed_over)
    assert rig.router.buffered == 1
    rig.wait_and_tick(TICK_INTERVAL)
    assert (rig.reports, rig.acked) == ([("expired", "a")], [1])
    rig.check_nothing_left()


async def test_requeued_message_that_has_expired_reaches_nobody(rig: Rig) -> None:
    rig.deliver("a")
    handed_over = rig.hand_over("a")
    receiving = await start_receive(rig, "a")
    rig.now += 60
    rig.router.hand_overs.requeue(handed_over)
    await let_run()
    assert (receiving.done(), rig.reports) == (False, [("expired", "a")])
    rig.deliver("a")
    assert await receiving == 2
    rig.check_nothing_left()


def test_group_message_is_acked_when_the_last_member_has_it_handed_over_or_not(rig: Rig) -> None:
    rig.join("g", "a", "b", "c")
    rig.deliver(group="g")
    handed_over = rig.hand_over("a")
    assert rig.take("b") == 1
    rig.router.hand_overs.requeue(handed_over)
    rig.check_books()
    assert (rig.acked, rig.router.unacked) == ([], 1)
    assert rig.take("a") == 1
    assert rig.acked == []
    rig.router.hand_overs.accept(rig.hand_over("c"))
    assert rig.acked == [1]
    rig.check_nothing_left()


@pytest.mark.parametrize("is_accepted", [True, False])
def test_lost_connection_leaves_what_is_handed_over(rig: Rig, is_accepted: bool) -> None:
    rig.fill("a", 2)
    handed_over = rig.hand_over("a")
    rig.router.connection_lost()
    rig.deliver("a")
    (rig.router.hand_overs.accept if is_accepted else rig.router.hand_overs.requeue)(handed_over)
    rig.check_books()
    assert rig.take_all("a", 2 if is_accepted else 3) == ([2, 3] if is_accepted else [1, 2, 3])
    assert rig.acked == [1, 3]
    rig.check_nothing_left()


async def test_closing_ends_calls_that_wait_for_a_hand_over(rig: Rig) -> None:
    rig.fill("a", 2)
    accepted, requeued = rig.hand_over("a"), rig.hand_over("a")
    handing_over = await start_hand_over(rig, "a")
    rig.router.close()
    with pytest.raises(StopConsumer):
        await handing_over
    with pytest.raises(StopConsumer):
        await rig.router.hand_overs.hand_over("a")
    rig.router.hand_overs.accept(accepted)
    rig.router.hand_overs.requeue(requeued)
    assert rig.counters.consumed == 0
    rig.check_nothing_left()


# Ages


async def test_notes_the_highest_age_of_what_is_received(rig: Rig) -> None:
    rig.deliver("a", age=3)
    rig.now += 2
    rig.deliver("a", age=4)
    rig.deliver("b", age=-1)
    assert rig.ages.newest(rig.now) == 0
    rig.take_all("a", 2)
    rig.take("b")
    waiting = await start_receive(rig, "c")
    rig.deliver("c", age=6)
    await waiting
    assert rig.old == [(5, "a"), (6, "c")]
    assert rig.ages.newest(rig.now) == 6


def test_notes_no_age_of_what_is_dropped(rig: Rig) -> None:
    rig.deliver("a", age=3)
    rig.wait_and_tick(60)
    assert rig.old == []


def test_notes_the_age_of_what_is_handed_over_when_it_is_accepted(rig: Rig) -> None:
    rig.deliver("a", age=3)
    rig.router.hand_overs.requeue(rig.hand_over("a"))
    handed_over = rig.hand_over("a")
    rig.now += 4
    assert rig.old == []
    rig.router.hand_overs.accept(handed_over)
    assert rig.old == [(7, "a")]


def test_ticks_end_the_window_of_ages(rig: Rig) -> None:
    rig.deliver("a", age=5)
    rig.take("a")
    for age in (3, 2):
        rig.wait_and_tick(WINDOW)
        rig.deliver("a", age=age)
        rig.take("a")
    assert rig.old == [(5, "a"), (3, "a"), (2, "a")]
    assert rig.ages.newest(rig.now) == 3


# For operators, and what it costs


async def test_names_the_channels_that_hold_most_of_what_counts(rig: Rig) -> None:
    for channel, count in (("a", 1), ("b", 3), ("c", 2)):
        rig.fill(channel, count)
    assert rig.router.fullest_channels(2) == [("b", 3), ("c", 2)]
    assert rig.router.fullest_channels() == [("b", 3), ("c", 2), ("a", 1)]
    await start_receive(rig, "eager")
    assert rig.router.fullest_channels() == [("a", 1)]


async def test_names_the_channels_that_were_relieved_and_are_not_just_busy(rig: Rig) -> None:
    await stall(rig)
    rig.deliver("not relieved")
    rig.now += BEHIND
    rig.deliver("stuck")
    assert rig.router.channels_behind() == []
    rig.now += 0.1
    assert rig.router.channels_behind() == [("stuck", 6)]
    rig.take_all("stuck", 5)
    rig.now += BEHIND
    assert rig.router.channels_behind() == []


async def test_repr_tells_the_state(rig: Rig) -> None:
    await stall(rig)
    rig.deliver("other")
    assert repr(rig.router) == (
        "<Router: unacked=1 messages=6 in 2 channels (1 stalled),"
        " in hand-off=0, receivers waiting=1>"
    )
    rig.hand_over("other")
    assert repr(rig.router) == (
        "<Router: unacked=0 messages=5 in 1 channels (1 stalled),"
        " in hand-off=1, receivers waiting=1>"
    )


async def test_idle_channels_have_no_containers(rig: Rig) -> None:
    """There may be 10,000 websockets, and two empty deques are 1.2 KiB."""
    task = await start_receive(rig, "a")
    (mailbox,) = rig.mailboxes.by_channel.values()
    assert not hasattr(mailbox, "__dict__")
    containers = [
        getattr(mailbox, name)
        for name in Mailbox.__slots__
        if isinstance(getattr(mailbox, name), Iterable)
    ]
    assert containers == ["a", mailbox.waiter]  # The channel's name; a future counts as iterable.
    task.cancel()


# Whole sites, simulated


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
            self._tick_at = rig.now + TICK_INTERVAL if rig.router.holds_messages else None
        if self._tick_at is not None and self._tick_at <= rig.now:
            rig.router.tick()
            self._tick_at = None
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
    assert rig.counters.consumed > 1000
    assert max(itertools.chain(*site.latencies.values())) <= 0.11
    assert {channel for _, channel in rig.reports} == set(stuck)
    assert rig.router.stalled_channels > 0
    for consumer in consumers:
        consumer.cancel()
    await let_run()


async def test_overload_of_all_drops_nothing_silently() -> None:
    """Each consumer gets ten times what it can handle: its senders see ChannelFull."""
    rig = Rig(local_capacity=20)
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
    assert rig.counters.consumed > 300
    for consumer in consumers:
        consumer.cancel()
    await let_run()


# Any interleaving

CHANNELS = st.sampled_from("abcd")
GROUPS = st.sampled_from("gh")


class RouterMachine(RuleBasedStateMachine):
    """Deliveries within the prefetch count, receivers that come, are cancelled and run, handing
    over, time, members that join and leave, lost connections; steps of the event loop, and so
    relief, are rules too."""

    CAPACITY = 3
    LOCAL_CAPACITY = 6
    LOCAL_EXPIRY = 10.0
    EARLY_ACKED_BYTES = 6 * MESSAGE_OVERHEAD

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(_relief, "EARLY_ACKED_BYTES", self.EARLY_ACKED_BYTES)
        self.rig = Rig(
            local_capacity=self.LOCAL_CAPACITY,
            local_expiry=self.LOCAL_EXPIRY,
            capacity=self.CAPACITY,
            loop=self.loop,
        )
        self.tasks: list[asyncio.Task[None]] = []
        # What the broker has to get back from this connection, and what nobody may ack any more
        self.unacked: set[int] = set()
        self.lost: set[int] = set()
        self.acks_seen = 0
        # Numbers addressed to each channel, in order, and those that it received
        self.addressed: dict[str, list[int]] = {channel: [] for channel in "abcd"}
        self.received: dict[str, list[int]] = {channel: [] for channel in "abcd"}
        # What is handed over, and the numbers that ever were: they may have been overtaken.
        self.handed_over: list[HandedOver] = []
        self.overtaken: dict[str, set[int]] = {channel: set() for channel in "abcd"}
        self.arrived_at: dict[int, float] = {}
        self.unwanted = 0
        self.rig.join("g", "a", "b", "c")

    async def consume(self, channel: str) -> None:
        number = (await self.rig.router.receive(channel))["number"]
        self.check_received(channel, number)
        self.received[channel].append(number)

    async def hand_over(self, channel: str) -> None:
        handed_over = await self.rig.router.hand_overs.hand_over(channel)
        number = number_of(handed_over)
        self.check_received(channel, number)
        self.handed_over.append(handed_over)
        self.overtaken[channel].add(number)

    def check_received(self, channel: str, number: int) -> None:
        assert number in self.addressed[channel]
        assert number not in self.received[channel]
        assert self.rig.now < self.arrived_at[number] + self.LOCAL_EXPIRY

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
        self.rig.members.discard(group, channel)

    @rule(
        channels=st.lists(CHANNELS, min_size=1, max_size=4),
        to_others=st.booleans(),
        run=st.booleans(),
    )
    def receive(self, channels: list[str], to_others: bool, run: bool) -> None:
        for channel in channels:
            call = self.hand_over if to_others else self.consume
            self.tasks.append(self.loop.create_task(call(channel)))
        if run:
            self.step()

    @precondition(lambda self: self.handed_over)
    @rule(data=st.data(), is_accepted=st.booleans())
    def end_hand_over(self, data: st.DataObject, is_accepted: bool) -> None:
        handed_over = data.draw(st.sampled_from(self.handed_over))
        self.handed_over.remove(handed_over)
        if is_accepted:
            self.received[handed_over.channel].append(number_of(handed_over))
            self.rig.router.hand_overs.accept(handed_over)
        else:
            self.rig.router.hand_overs.requeue(handed_over)

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
            self.rig.router.tick()
            self.check_relieved()

    def check_relieved(self) -> None:
        """Nobody is held up by a channel that is behind."""
        router = self.rig.router
        if router.receivers and router.unacked >= 3:
            assert not any(box.unacked and box.is_behind for box in self.rig.mailboxes.holding)

    @rule(eager=CHANNELS, stuck=CHANNELS, count=st.integers(3, 6), is_handed_over=st.booleans())
    def get_stuck(self, eager: str, stuck: str, count: int, is_handed_over: bool) -> None:
        """One receives and another doesn't: chance alone relieves a channel too seldom."""
        self.receive([eager], to_others=False, run=True)
        self.deliver([stuck] * count, size=10)
        if is_handed_over:
            self.receive([stuck], to_others=True, run=True)
        self.step()

    @rule()
    def lose_connection(self) -> None:
        self.collect_acks()
        self.lost |= self.unacked
        self.unacked.clear()
        self.rig.router.connection_lost()
        assert self.rig.router.unacked == 0

    @rule()
    def come_to_rest(self) -> None:
        """Then nobody waits on a channel that has a message."""
        for _ in range(30):
            self.step()
        self.drop_done()
        router = self.rig.router
        waiting = 0
        for mailbox in self.rig.mailboxes.by_channel.values():
            assert not mailbox.reserved
            assert mailbox.first is None or mailbox.waiter is None
            waiting += (mailbox.waiter is not None) + len(mailbox.more_waiters or ())
        assert router.receivers == waiting == len(self.tasks)

    def drop_done(self) -> None:
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.result()
        self.tasks = [task for task in self.tasks if not task.done()]

    @invariant()
    def it_asks_for_a_tick(self) -> None:
        assert self.rig.router.holds_messages == bool(self.rig.mailboxes.holding)

    @invariant()
    def books_are_right(self) -> None:
        self.collect_acks()
        router = self.rig.router
        assert router.unacked == len(self.unacked) <= self.LOCAL_CAPACITY
        self.rig.check_books()
        assert self.rig.handed_over == set(self.handed_over)
        assert router.early_acked_bytes <= self.EARLY_ACKED_BYTES
        for mailbox in self.rig.mailboxes.by_channel.values():
            assert mailbox.early_acked <= self.CAPACITY

    @invariant()
    def every_message_is_accounted_for(self) -> None:
        counters = self.rig.counters
        assert counters.consumed == sum(map(len, self.received.values()))
        assert counters.expired == sum(reason == "expired" for reason, _ in self.rig.reports)
        assert counters.overflowed == sum(reason == "overflowed" for reason, _ in self.rig.reports)
        assert counters.no_members == self.unwanted
        dropped = Counter(channel for _, channel in self.rig.reports)
        in_hand_over = Counter(handed_over.channel for handed_over in self.handed_over)
        for channel in "abcd":
            mailbox = self.rig.mailboxes.by_channel.get(channel)
            held = 0 if mailbox is None else mailbox.size
            ended = len(self.received[channel]) + dropped[channel]
            assert len(self.addressed[channel]) == ended + held + in_hand_over[channel]

    @invariant()
    def channels_are_in_order(self) -> None:
        for channel, received in self.received.items():
            # For what was never handed over; the mailboxes' order is looked at with the books.
            in_order = [number for number in received if number not in self.overtaken[channel]]
            assert all(earlier < later for earlier, later in itertools.pairwise(in_order))

    def teardown(self) -> None:
        try:
            self.come_to_rest()
            for task in self.tasks:
                task.cancel()
            self.come_to_rest()
            assert not self.tasks
            for handed_over in self.handed_over:
                self.rig.router.hand_overs.requeue(handed_over)
            self.handed_over.clear()
            self.wait(self.LOCAL_EXPIRY, tick=True)
            self.rig.check_nothing_left()
            self.books_are_right()
            self.every_message_is_accounted_for()
            assert not self.unacked
            assert not self.lost & set(self.rig.acked)
        finally:
            self.patch.undo()
            self.loop.close()


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(stateful_step_count=50)
# Beside other suites it has taken more than a minute.
TestRouterMachine.pytestmark = pytest.mark.timeout(300)
