"""Whatever bytes come, with a peer that tests play."""

from __future__ import annotations

import asyncio
from typing import Any

import pamqp.commands as commands
from hypothesis import given
from hypothesis import strategies as st
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from channels_rabbitmq._amqp import content
from channels_rabbitmq._amqp.publishing import Route
from tests.support.amqp_peer import Peer, delivery, marshal, returned
from tests.support.deadlines import soon

# What a broker says at the right moment; at another it is as wrong as anything.
_PROPER: list[list[Any]] = [
    [commands.Channel.OpenOk()],
    [commands.Channel.Close(404, "NOT_FOUND", 0, 0)],
    [commands.Channel.CloseOk()],
    [commands.Channel.Flow(False)],
    [commands.Confirm.SelectOk()],
    [commands.Queue.BindOk()],
    [commands.Basic.QosOk()],
    [commands.Basic.ConsumeOk("channels")],
    [commands.Basic.Cancel("channels", True)],
    [commands.Basic.Ack(1)],
    [commands.Basic.Ack(0, True)],
    [commands.Basic.Ack(2**63 - 1, True)],
    [commands.Basic.Nack(1)],
    [commands.Connection.Blocked("low on memory")],
    [commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0)],
    delivery(1, b"body"),
    delivery(0, b""),
    delivery(2**63 - 1, b"in two pieces", pieces=2),
    returned(b"x", correlation_id="1"),
    returned(b"x", correlation_id="99999999999999999999"),
]


@st.composite
def any_frame(draw: st.DrawFn) -> bytes:
    """A whole frame on some AMQP channel: any method, a content header, a body, a heartbeat."""
    channel = draw(st.integers(0, 5))
    kinds = ["proper"] * 6 + ["method", "header", "body", "heartbeat"]
    kind = draw(st.sampled_from(kinds))
    if kind == "proper":
        return marshal(*draw(st.sampled_from(_PROPER)), channel=channel)
    if kind == "header":
        return marshal(ContentHeader(body_size=draw(st.integers(0, 2**63 - 1))), channel=channel)
    if kind == "body":
        return marshal(ContentBody(draw(st.binary(max_size=20))), channel=channel)
    if kind == "heartbeat":
        return marshal(Heartbeat(), channel=channel)
    index = draw(st.sampled_from(sorted(commands.INDEX_MAPPING)))
    # Arguments as bytes, since pamqp won't write those that make no sense
    payload = index.to_bytes(4, "big") + draw(
        st.binary(max_size=30) | st.just(b"") | st.just(b"\0" * 40)
    )
    head = b"\x01" + channel.to_bytes(2, "big") + len(payload).to_bytes(4, "big")
    return head + payload + b"\xce"


@given(st.lists(any_frame(), min_size=1, max_size=30), st.integers(0, 40), st.integers(1, 50))
async def test_any_frames_in_any_order_leave_nobody_waiting(
    frames: list[bytes], cut: int, piece: int
) -> None:
    """On channels that consume, bind and publish; the last frame is cut short."""
    peer = Peer()
    got: list[bytes] = []
    ended: list[Exception] = []
    consumer = peer.consumer(lambda body, tag, published, consumer: got.append(body), ended.append)
    topology = peer.topology()
    publisher = peer.publisher(ended.append)
    waiting: list[asyncio.Future[Any]] = [
        consumer.consume("q", 10),
        topology.call(commands.Queue.Bind(queue="q", exchange="e")),
        publisher.publish(
            b"x", Route("e", "k", mandatory=True), soon()
        ),
    ]  # fmt: skip
    data = b"".join(frames)
    data = data[: len(data) - cut]
    for at in range(0, len(data), piece):
        peer.protocol.data_received(data[at : at + piece])
        consumer.ack(1)
    await peer.lost()
    assert all(future.done() for future in waiting)
    for future in waiting:
        if isinstance(future.exception(), Exception):
            assert not isinstance(future.exception(), (AssertionError, KeyError, IndexError))
    assert peer.protocol.closed.done()
    reason = peer.protocol.closed.result()
    # A bug of ours would be the end by anything else.
    assert reason is None or type(reason).__module__.startswith(("carehare", "channels_rabbitmq"))


async def test_a_body_larger_than_any_broker_lets_through_is_not_waited_for() -> None:
    """Else a peer that sends it could fill all memory, one frame after the other."""
    peer = Peer()
    got: list[bytes] = []
    peer.consumer(lambda body, tag, published, consumer: got.append(body), lambda exc: None)
    deliver = commands.Basic.Deliver("channels", 1, False, "e", "key")
    peer.feed(deliver, ContentHeader(body_size=content.LARGEST_BODY + 1), channel=1)
    assert peer.protocol.closed.done() or peer.transport.is_closing()
    assert "larger" in str(await peer.protocol.closed)
    assert got == []
