"""``OnDemandChannel``: what it makes of what the broker says, by hand-made frames."""

from __future__ import annotations

import carehare
import pytest
from pamqp import commands

from channels_rabbitmq._amqp.on_demand import OnDemandChannel
from channels_rabbitmq._amqp.protocol import ProtocolError
from tests.support.amqp_peer import Peer, close_channel, close_connection, content, marshal


class Bench:
    """The AMQP channel, opened, and what it has reported."""

    def __init__(self) -> None:
        self.peer = Peer()
        self.delivered: list[tuple[str, bytes, int]] = []
        self.cancelled: list[str] = []
        self.ends: list[Exception] = []
        self.channel = self.peer.protocol.add_channel(
            lambda number: OnDemandChannel(
                self.peer.protocol,
                number,
                on_delivery=lambda name, body, tag, _: self.delivered.append((name, body, tag)),
                on_cancelled=self.cancelled.append,
                on_end=lambda exc, _: self.ends.append(exc),
            )
        )
        assert self.peer.names() == [(1, "Channel.Open"), (1, "Basic.Qos")]
        self.peer.feed(commands.Channel.OpenOk(), commands.Basic.QosOk(), channel=1)

    def feed(self, *frames: object) -> None:
        self.peer.feed(*frames, channel=1)


def deliver(consumer_tag: str, tag: int) -> object:
    return commands.Basic.Deliver(consumer_tag, tag, False, "exchange", "key")


async def test_deliveries_of_several_consumers() -> None:
    bench = Bench()
    for name in ("1.a", "2.b.c"):
        done = bench.channel.consume("queue", name)
        bench.feed(commands.Basic.ConsumeOk(name))
        assert done.done()
    bench.feed(deliver("1.a", 1), *content(b"one"), deliver("2.b.c", 2), *content(b""))
    bench.feed(deliver("1.a", 3), *content(b"three", pieces=3, headers={"x": 1}))
    assert bench.delivered == [("1.a", b"one", 1), ("2.b.c", b"", 2), ("1.a", b"three", 3)]


async def test_bytes_may_come_in_any_pieces() -> None:
    bench = Bench()
    data = marshal(deliver("1.a", 1), *content(b"body"), channel=1)
    for at in range(len(data)):
        assert bench.delivered == []
        bench.peer.protocol.data_received(data[at : at + 1])
    assert bench.delivered == [("1.a", b"body", 1)]


async def test_an_ack_is_written_at_once_behind_what_waits() -> None:
    bench = Bench()
    bench.peer.taken()
    bench.channel.cancel("1.a")
    bench.channel.ack(7)
    written, bench.peer.transport.written = bench.peer.transport.written, b""
    cancel = commands.Basic.Cancel("1.a")
    assert written == marshal(cancel, commands.Basic.Ack(7), channel=1)
    bench.channel.requeue(8)
    assert bench.peer.raw() == marshal(commands.Basic.Nack(8, requeue=True), channel=1)


async def test_the_broker_cancels_a_consumer() -> None:
    bench = Bench()
    bench.feed(commands.Basic.Cancel("1.a"))
    assert (bench.cancelled, bench.ends) == (["1.a"], [])
    assert not bench.channel.is_closed


async def test_a_refused_consumer() -> None:
    bench = Bench()
    done = bench.channel.consume("queue", "1.a")
    bench.feed(close_channel())
    assert isinstance(done.exception(), carehare.ChannelClosedByServer)
    assert [type(end) for end in bench.ends] == [carehare.ChannelClosedByServer]
    assert bench.channel.is_closed
    bench.peer.taken()
    bench.channel.cancel("1.a")
    bench.channel.requeue(1)
    assert bench.peer.raw() == b""


async def test_the_connections_end_is_not_reported() -> None:
    bench = Bench()
    done = bench.channel.consume("queue", "1.a")
    bench.peer.feed(close_connection())
    await bench.peer.protocol.closed
    assert done.exception() is not None
    assert bench.channel.is_closed
    assert bench.ends == []


async def test_a_detached_one_is_silent() -> None:
    bench = Bench()
    bench.channel.detach()
    bench.feed(deliver("1.a", 1), *content(b"one"), commands.Basic.Cancel("1.a"), close_channel())
    assert bench.delivered == bench.cancelled == bench.ends == []


@pytest.mark.parametrize(
    "frames",
    [
        [deliver("1.a", 1), deliver("1.a", 2)],
        [deliver("1.a", 1), commands.Basic.Cancel("1.a")],
        content(b"body"),
        [commands.Basic.GetEmpty()],
    ],
    ids=range(4),
)
async def test_frames_out_of_place_end_the_connection(frames: list[object]) -> None:
    bench = Bench()
    bench.feed(*frames)
    assert isinstance(await bench.peer.protocol.closed, ProtocolError)
