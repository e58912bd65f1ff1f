"""A queue that has gone deaf is noticed by a message that doesn't come back."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import pytest

from channels_rabbitmq import _probe
from channels_rabbitmq._amqp.amqp_channels import Outcome
from channels_rabbitmq._probe import Probe
from channels_rabbitmq._supervisor import Supervisor
from channels_rabbitmq.exceptions import BrokerUnavailable


class FakeSupervisor:
    def __init__(self) -> None:
        self.connection: object | None = object()
        self.given_up: asyncio.Queue[str] = asyncio.Queue()

    def give_up_connection(self, reason: str) -> None:
        self.given_up.put_nowait(reason)


class Bench:
    """A probe on fakes; ``answer`` is what becomes of the messages it sends."""

    def __init__(self) -> None:
        self.supervisor = FakeSupervisor()
        self.sent: asyncio.Queue[None] = asyncio.Queue()
        self.answer: Outcome | Exception = Outcome.CONFIRMED
        self.arrives = False  # with its confirm
        self.arrives_later = False
        self.full = False
        self.delivered = 0
        self.probe = Probe(
            cast(Supervisor, self.supervisor),
            send=self.send,
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
            asyncio.get_running_loop().call_later(_probe.ANSWER_TIMEOUT / 2, self._deliver)
        return self.answer

    def _deliver(self) -> None:
        self.delivered += 1

    async def probes(self, count: int) -> None:
        for _ in range(count):
            await asyncio.wait_for(self.sent.get(), 10)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_probe, "INTERVAL", 0.01)
    monkeypatch.setattr(_probe, "ANSWER_TIMEOUT", 0.01)
    bench = Bench()
    task = asyncio.create_task(bench.probe.run())
    yield bench
    task.cancel()
    await asyncio.wait([task])


async def test_a_probe_that_does_not_arrive_gives_the_connection_up(bench: Bench) -> None:
    reason = await asyncio.wait_for(bench.supervisor.given_up.get(), 10)
    assert "nothing arrives" in reason


async def test_a_full_queue_that_delivers_nothing_is_deaf_too(bench: Bench) -> None:
    bench.answer = Outcome.REFUSED
    assert "nothing arrives" in await asyncio.wait_for(bench.supervisor.given_up.get(), 10)


async def test_a_returned_probe_gives_the_connection_up(bench: Bench) -> None:
    bench.answer = Outcome.RETURNED
    assert "binding" in await asyncio.wait_for(bench.supervisor.given_up.get(), 10)


@pytest.mark.parametrize(
    "answer", [Outcome.UNKNOWN, Outcome.BLOCKED, BrokerUnavailable("no connection")]
)
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


async def test_a_probe_that_arrives_after_its_confirm_is_fine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_probe, "ANSWER_TIMEOUT", 1.0)  # more than a busy machine is late
    bench.arrives_later = True
    await bench.probes(2)
    assert bench.supervisor.given_up.empty()


async def test_no_probe_while_something_arrives(bench: Bench) -> None:
    bench.arrives = True
    await bench.probes(1)
    # From now on something new is there whenever it looks.
    bench.probe._delivered = itertools.count().__next__
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(bench.probes(1), 0.1)  # ten intervals


async def test_a_connection_that_took_the_place_of_a_deaf_one_is_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_probe, "ANSWER_TIMEOUT", 0.2)
    await bench.probes(1)
    bench.supervisor.connection = object()
    bench.arrives = True  # by the new one, from the next probe on
    await bench.probes(2)
    assert bench.supervisor.given_up.empty()
