"""A queue that has gone deaf is noticed by a message that doesn't come back."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import pytest

from channels_rabbitmq._amqp.publishing import Outcome
from channels_rabbitmq._broker import watchdog as _watchdog
from channels_rabbitmq._broker.probes import Probes
from channels_rabbitmq._broker.subscriber import Subscriber
from channels_rabbitmq._broker.watchdog import Watchdog
from channels_rabbitmq.exceptions import BrokerUnavailable


class FakeConnection:
    """``is_overdue`` says whether the broker was heard long enough."""

    def __init__(self, *, has_heartbeats: bool = True) -> None:
        self.has_heartbeats = has_heartbeats
        self.overdue = True

    def mark(self) -> object:
        return self

    def is_overdue(self, mark: object) -> bool:
        assert mark is self
        return self.overdue


class FakeSupervisor:
    name = "subscriber crq.aaaaaaaaaaaaaaaa"

    def __init__(self) -> None:
        self.connection: FakeConnection | None = FakeConnection()
        self.given_up: asyncio.Queue[str] = asyncio.Queue()

    def reconnect(self, reason: str) -> None:
        self.given_up.put_nowait(reason)


class Bench:
    """A watchdog on fakes, itself one; ``answer`` is what becomes of the messages it sends."""

    def __init__(self) -> None:
        self.supervisor = FakeSupervisor()
        self.connection = FakeConnection()
        self.supervisor.connection = self.connection
        self.sent: asyncio.Queue[None] = asyncio.Queue()
        self.answer: Outcome | Exception = Outcome.CONFIRMED
        self.ping_answer = Outcome.CONFIRMED
        self.pings = 0
        self.asked = 0
        self.arrives = False  # with its confirm
        self.arrives_later = False
        self.full = False
        self.delivered = 0
        self.watchdog = Watchdog(
            cast(Subscriber, self),
            cast(Probes, self),
            0.01,
            delivered=lambda: self.delivered,
            is_full=lambda: self.full,
        )

    async def send(self) -> Outcome:
        self.sent.put_nowait(None)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.arrives:
            self._deliver()
        if self.arrives_later:
            asyncio.get_running_loop().call_later(0.03, self._deliver)
        return self.answer

    async def ping(self) -> Outcome:
        self.pings += 1
        return self.ping_answer

    def request_answer(self) -> None:
        self.asked += 1

    def _deliver(self) -> None:
        self.delivered += 1

    async def probes(self, count: int) -> None:
        for _ in range(count):
            await asyncio.wait_for(self.sent.get(), 10)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_watchdog, "LOOK_INTERVAL", 0.005)
    bench = Bench()
    task = asyncio.create_task(bench.watchdog.run())
    yield bench
    task.cancel()
    await asyncio.wait([task])


async def test_a_probe_that_does_not_arrive_gives_the_connection_up(bench: Bench) -> None:
    reason = await asyncio.wait_for(bench.supervisor.given_up.get(), 10)
    assert "nothing arrives" in reason


async def test_a_full_queue_that_delivers_nothing_is_deaf_too(bench: Bench) -> None:
    bench.answer = Outcome.NACKED
    assert "nothing arrives" in await asyncio.wait_for(bench.supervisor.given_up.get(), 10)


async def test_a_returned_probe_gives_the_connection_up(bench: Bench) -> None:
    bench.answer = Outcome.RETURNED
    assert "binding" in await asyncio.wait_for(bench.supervisor.given_up.get(), 10)


@pytest.mark.parametrize("answer", [Outcome.BLOCKED, BrokerUnavailable("no connection")])
async def test_a_probe_that_could_not_be_sent_tells_nothing(
    bench: Bench, answer: Outcome | Exception
) -> None:
    bench.answer = answer
    await bench.probes(3)
    assert bench.supervisor.given_up.empty()


async def test_a_probe_that_arrives_is_fine(bench: Bench) -> None:
    bench.arrives = True
    await bench.probes(3)
    assert bench.supervisor.given_up.empty()


async def test_no_probe_while_local_capacity_is_in_use_or_nothing_is_connected(
    bench: Bench,
) -> None:
    bench.full = True
    await asyncio.sleep(0.03)  # three intervals, in which nothing happens
    bench.full = False
    bench.supervisor.connection = None
    await asyncio.sleep(0.03)  # the same
    assert bench.sent.empty()


async def test_a_probe_may_take_as_long_as_the_broker_is_not_heard(bench: Bench) -> None:
    """However long that is: a frozen broker delivers it afterwards."""
    bench.connection.overdue = False
    await bench.probes(1)
    await asyncio.sleep(0.1)  # many looks
    assert bench.supervisor.given_up.empty()
    assert bench.sent.empty()
    bench.connection.overdue = True
    assert "nothing arrives" in await asyncio.wait_for(bench.supervisor.given_up.get(), 10)


async def test_a_probe_that_arrives_after_its_confirm_is_fine(bench: Bench) -> None:
    bench.connection.overdue = False
    bench.arrives_later = True
    await bench.probes(3)
    assert bench.supervisor.given_up.empty()


@pytest.mark.parametrize("ping_answer", [Outcome.UNKNOWN, Outcome.BLOCKED])
async def test_a_publisher_that_hangs_is_not_the_queue_s_fault(
    bench: Bench, ping_answer: Outcome
) -> None:
    bench.answer = Outcome.UNKNOWN
    bench.ping_answer = ping_answer
    await bench.probes(3)
    assert bench.supervisor.given_up.empty()
    assert bench.pings >= 2


@pytest.mark.parametrize("ping_answer", [Outcome.CONFIRMED, Outcome.NACKED])
async def test_a_queue_that_neither_confirms_nor_delivers_is_deaf(
    bench: Bench, ping_answer: Outcome
) -> None:
    """Only after a second probe, since the first may have gone by a publisher that hung."""
    bench.answer = Outcome.UNKNOWN
    bench.ping_answer = ping_answer
    assert "nothing arrives" in await asyncio.wait_for(bench.supervisor.given_up.get(), 10)
    assert bench.pings == 1
    assert bench.sent.qsize() == 2


@pytest.mark.parametrize("has_heartbeats", [True, False])
async def test_without_heartbeats_the_watched_connection_is_asked(
    bench: Bench, has_heartbeats: bool
) -> None:
    bench.connection.has_heartbeats = has_heartbeats
    bench.arrives = True
    await bench.probes(3)
    assert bool(bench.asked) is not has_heartbeats


async def test_no_probe_while_something_arrives(bench: Bench) -> None:
    bench.arrives = True
    await bench.probes(1)
    # From now on something new is there whenever it looks.
    bench.watchdog._delivered = itertools.count().__next__
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(bench.probes(1), 0.1)  # ten intervals


async def test_a_connection_that_took_the_place_of_a_deaf_one_is_kept(bench: Bench) -> None:
    bench.connection.overdue = False
    await bench.probes(1)
    bench.supervisor.connection = FakeConnection()
    bench.arrives = True  # by the new one, from the next probe on
    await bench.probes(2)
    assert bench.supervisor.given_up.empty()
