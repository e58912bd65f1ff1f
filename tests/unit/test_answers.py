"""When answers stay out: what the layer's AMQP channels make of it, with a broker in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import carehare
import pytest
from pamqp import commands
from pamqp.heartbeat import Heartbeat

from channels_rabbitmq._amqp import heartbeat, publishing
from channels_rabbitmq._amqp.publishing import Outcome, PublisherChannel, Route
from tests.support.amqp_peer import Peer

ROUTE = Route("groups", "g", mandatory=False)
PING = Route("groups", "!ping", mandatory=False)


class Bench:
    """A peer whose ticks the test makes, and whose heartbeats it times."""

    def __init__(self) -> None:
        self.peer = Peer("amqp://broker?heartbeat=60", heartbeat=60)
        self.protocol = self.peer.protocol
        self.end_excs: list[Exception] = []

    def publisher(self, ping_route: Route | None = PING) -> PublisherChannel:
        channel = self.protocol.add_channel(
            lambda number: PublisherChannel(
                self.protocol, number, on_end=self.end_excs.append, ping_route=ping_route
            )
        )
        self.peer.open(channel, commands.Confirm.SelectOk())
        self.tick()  # so that these answers are old
        return channel

    def tick(self) -> None:
        self.peer.tick()

    def beat(self) -> None:
        """A heartbeat comes, long after the one before."""
        self.protocol.heartbeat._next_beat_at = 0.0
        self.peer.feed(Heartbeat())

    def pings(self) -> int:
        return sum(
            isinstance(frame, commands.Basic.Publish) and frame.routing_key == PING.routing_key
            for _, frame in self.peer.taken()
        )

    def publish(self, channel: PublisherChannel, timeout: float = 60) -> asyncio.Future[Outcome]:
        future = channel.publish(b"x", ROUTE, asyncio.get_running_loop().time() + timeout)
        self.peer.taken()
        return future


@pytest.fixture
async def bench() -> Bench:
    return Bench()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "BLOCKED_BEFORE_PING", 0.0)


async def test_a_channel_that_answers_nothing_ends_the_connection(bench: Bench) -> None:
    unconfirmed = bench.publish(bench.publisher())
    bench.tick()
    bench.beat()
    bench.tick()
    assert bench.protocol.is_open
    bench.beat()
    bench.tick()
    assert not bench.protocol.is_open
    exc = await bench.protocol.closed
    assert isinstance(exc, carehare.ConnectionClosed)
    assert "though it is alive" in str(exc)
    assert await unconfirmed is Outcome.UNKNOWN


async def test_a_bind_without_an_answer_ends_the_connection(bench: Bench) -> None:
    topology = bench.peer.topology()
    bench.tick()
    bind = topology.call(commands.Exchange.Bind(destination="a", source="b"))
    for _ in range(3):
        bench.tick()
        bench.beat()
    with pytest.raises(carehare.ConnectionClosed, match="though it is alive"):
        await bind


async def test_any_answer_is_enough(bench: Bench) -> None:
    topology = bench.peer.topology()
    for _ in range(2):
        topology.call(commands.Exchange.Bind(destination="a", source="b"))
    for _ in range(2):
        bench.tick()
        bench.beat()
    bench.peer.feed(commands.Exchange.BindOk(), channel=1)
    bench.tick()
    bench.beat()
    bench.tick()
    assert bench.protocol.is_open


async def test_time_alone_is_no_reason(bench: Bench) -> None:
    bench.publish(bench.publisher())
    for _ in range(100):
        bench.tick()
    bench.beat()
    for _ in range(100):
        bench.tick()
    assert bench.protocol.is_open


async def test_what_nobody_waits_for_any_more_still_counts(bench: Bench) -> None:
    """The answer to the last message came in the same moment in which this one was written."""
    channel = bench.publisher()
    bench.publish(channel)
    bench.peer.feed(commands.Basic.Ack(1), channel=1)
    assert await bench.publish(channel, timeout=0.01) is Outcome.UNKNOWN
    for _ in range(3):
        bench.tick()
        bench.beat()
    assert not bench.protocol.is_open


async def test_a_late_answer_counts(bench: Bench) -> None:
    channel = bench.publisher()
    assert await bench.publish(channel, timeout=0.01) is Outcome.UNKNOWN
    bench.tick()
    bench.beat()
    bench.peer.feed(commands.Basic.Ack(2, multiple=True), channel=1)  # and the ping
    for _ in range(4):
        bench.tick()
        bench.beat()
    assert bench.protocol.is_open


async def test_confirms_that_stay_out_are_asked_for_once(bench: Bench) -> None:
    channel = bench.publisher()
    bench.publish(channel)
    bench.tick()
    assert bench.pings() == 1
    assert channel.unconfirmed == 1
    bench.tick()
    assert bench.pings() == 0
    bench.peer.feed(commands.Basic.Ack(2), channel=1)
    assert channel.unconfirmed == 1
    await asyncio.sleep(0)
    # The first is stuck in its queue, which is no fault of the AMQP channel.
    last = 2
    for _ in range(10):
        bench.tick()
        bench.beat()
        if bench.pings():
            last += 1
            bench.peer.feed(commands.Basic.Ack(last), channel=1)
            await asyncio.sleep(0)
    assert bench.protocol.is_open
    assert last > 2


async def test_nothing_is_asked_while_all_is_answered(bench: Bench) -> None:
    channel = bench.publisher()
    for number in range(1, 5):
        bench.publish(channel)
        bench.peer.feed(commands.Basic.Ack(number), channel=1)
        bench.tick()
        bench.beat()
        bench.publish(channel)
        bench.tick()
        assert bench.pings() <= 1
        bench.peer.feed(commands.Basic.Ack(number), channel=1)
    assert bench.protocol.is_open


async def test_without_a_way_to_ask_the_rule_is_the_same(bench: Bench) -> None:
    bench.publish(bench.publisher(ping_route=None))
    for _ in range(3):
        bench.tick()
        assert bench.pings() == 0
        bench.beat()
    assert not bench.protocol.is_open


# Alarms


async def test_a_blocked_channel_is_never_left(bench: Bench) -> None:
    bench.publish(bench.publisher())
    bench.peer.feed(commands.Connection.Blocked("low on memory"))
    for _ in range(20):
        bench.tick()
        bench.beat()
    assert bench.protocol.is_open
    # Only from now on its answer is due.
    bench.peer.feed(commands.Connection.Unblocked())
    bench.tick()
    bench.tick()
    assert bench.protocol.is_open


@pytest.mark.parametrize("answer", [commands.Basic.Ack(1), commands.Basic.Nack(1)])
async def test_a_confirm_shows_that_publishers_are_not_blocked_any_more(
    bench: Bench, answer: Any
) -> None:
    """So does a nack, which comes from the full queue of an alternate exchange."""
    bench.publisher()
    bench.peer.feed(commands.Connection.Blocked("low on memory"))
    for _ in range(20):
        bench.tick()
        bench.beat()
    assert bench.pings() == 1
    assert bench.peer.blocked == ["low on memory"]
    bench.peer.feed(answer, channel=1)
    await asyncio.sleep(0)
    assert bench.peer.blocked == ["low on memory", None]
    # Whose word was only late.
    bench.peer.feed(commands.Connection.Unblocked())
    assert bench.peer.blocked == ["low on memory", None]


async def test_a_short_alarm_is_not_asked_about(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BLOCKED_BEFORE_PING", 5.0)
    bench.publisher()
    bench.peer.feed(commands.Connection.Blocked("low on memory"))
    for _ in range(5):
        bench.tick()
    assert bench.pings() == 0


async def test_a_confirm_of_the_last_alarm_says_nothing_about_this_one(bench: Bench) -> None:
    bench.publisher()
    bench.peer.feed(commands.Connection.Blocked("low on memory"))
    bench.tick()
    assert bench.pings() == 1
    bench.peer.feed(commands.Connection.Unblocked())
    await asyncio.sleep(0.001)
    bench.peer.feed(commands.Connection.Blocked("low on disk space"))
    bench.peer.feed(commands.Basic.Ack(1), channel=1)
    await asyncio.sleep(0)
    assert bench.peer.blocked == ["low on memory", None, "low on disk space"]
    bench.tick()
    assert bench.pings() == 1


async def test_what_a_queue_confirms_late_says_nothing_about_the_alarm(bench: Bench) -> None:
    channel = bench.publisher()
    bench.publish(channel)
    bench.peer.feed(commands.Connection.Blocked("low on memory"))
    bench.peer.feed(commands.Basic.Ack(1), channel=1)
    await asyncio.sleep(0)
    bench.tick()
    assert bench.peer.blocked == ["low on memory"]


# Without heartbeats


async def test_without_heartbeats_time_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "ANSWER_TIMEOUT_WITHOUT_HEARTBEATS", 0.05)
    peer = Peer()
    channel = peer.publisher()
    peer.tick()
    channel.publish(b"x", ROUTE, asyncio.get_running_loop().time() + 60)
    peer.tick()
    peer.tick()
    assert peer.protocol.is_open
    await asyncio.sleep(0.06)
    peer.tick()
    assert "for too long" in str(await peer.protocol.closed)
