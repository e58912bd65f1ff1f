"""carehare's methods on our AMQP channels, with a peer that tests play."""

from __future__ import annotations

import asyncio
import inspect
import re
import struct
from pathlib import Path
from typing import Any

import carehare
import pytest
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

import channels_rabbitmq
from channels_rabbitmq._amqp.channel_ids import ChannelIds
from channels_rabbitmq._carehare.connection import CarehareConnection
from channels_rabbitmq._carehare.consumer import AckingConsumer
from tests.support.amqp_peer import Peer, close_channel, content, delivery, plain


async def turn() -> None:
    await asyncio.sleep(0)  # lets what was scheduled before run


async def test_refused_call_ends_without_an_answer_to_its_close() -> None:
    """RabbitMQ 4.0 forgets it now and then; carehare waits for ever."""
    peer = Peer(channel_max=1)
    refused = peer.user.rpc(commands.Queue.Declare(queue="q"))
    waiting = peer.user.rpc(commands.Queue.Declare(queue="other"))
    peer.feed(commands.Channel.OpenOk(), close_channel(), channel=1)
    with pytest.raises(carehare.ChannelClosedByServer, match="404"):
        await refused
    # The number is free once that answer has come: it could be taken for another call's.
    assert [frame.name for _, frame in peer.taken()].count("Queue.Declare") == 1
    peer.feed(commands.Channel.CloseOk(), channel=1)
    assert [frame.name for _, frame in peer.taken()].count("Queue.Declare") == 1
    peer.feed(commands.Channel.OpenOk(), commands.Channel.CloseOk(), channel=1)
    await waiting
    await peer.lost()


async def test_calls_that_wait_for_an_amqp_channel_end_with_the_connection() -> None:
    peer = Peer(channel_max=2)
    calls = [peer.user.rpc(commands.Queue.Declare(queue="q", nowait=True)) for _ in range(5)]
    calls[3].cancel()
    await peer.lost()
    for call in (*calls[:3], calls[4]):
        with pytest.raises(carehare.ConnectionClosed):
            await asyncio.wait_for(call, 1)


async def test_calls_that_wait_for_an_amqp_channel_start_in_order() -> None:
    peer = Peer(channel_max=1)
    calls = [peer.user.rpc(commands.Queue.Declare(queue=f"q{n}", nowait=True)) for n in range(3)]
    for n in range(3):
        written = [frame for _, frame in peer.taken()]
        assert [frame.queue for frame in written if frame.name == "Queue.Declare"] == [f"q{n}"]
        peer.feed(commands.Channel.OpenOk(), commands.Channel.CloseOk(), channel=1)
        assert calls[n].result() is None
    await peer.lost()


async def test_no_amqp_channel_left_for_a_consumer_or_an_exchange() -> None:
    peer = Peer(channel_max=1)
    peer.user.acking_consumer("q", prefetch_size=0, prefetch_count=1)
    with pytest.raises(carehare.ChannelClosed, match="in use"):
        peer.user.acking_consumer("q", prefetch_size=0, prefetch_count=1)
    with pytest.raises(carehare.ChannelClosed, match="in use"):
        peer.user.publish(b"x", exchange_name="", routing_key="q")
    await peer.lost()


def test_amqp_channel_numbers_are_used_up_and_again() -> None:
    ids = ChannelIds(3)
    assert [ids.acquire() for _ in range(3)] == [1, 2, 3]
    with pytest.raises(carehare.ChannelClosed):
        ids.acquire()
    used: list[int | None] = []
    ids.acquire_later(used.append)
    ids.acquire_later(used.append)
    assert used == []
    ids.release(2)
    assert used == [2]
    ids.close()
    assert used == [2, None]
    ids.release(2)
    assert ids.acquire() == 2


@pytest.mark.parametrize("channel_max", [0, 65535])
def test_channel_max_of_zero_is_no_limit_but_that_of_the_number(channel_max: int) -> None:
    ids = ChannelIds(channel_max)
    for _ in range(65535):
        last = ids.acquire()
    assert last == 65535
    with pytest.raises(carehare.ChannelClosed):
        ids.acquire()


async def test_cancelled_consumer_gives_its_amqp_channel_back() -> None:
    peer = Peer(channel_max=1)
    consumer = peer.user.acking_consumer("q", prefetch_size=0, prefetch_count=2)
    peer.taken()
    peer.feed(commands.Channel.OpenOk(), commands.Basic.QosOk(), channel=1)
    peer.feed(*delivery(1, b"came before"), commands.Basic.Cancel("carehare"), channel=1)
    assert peer.names() == [(1, "Channel.Close")]
    # What came before the end is not lost, though it can't be acked any more.
    assert await consumer.next_delivery() == (b"came before", 1)
    consumer.ack(1)
    with pytest.raises(carehare.ChannelClosed):
        await consumer.next_delivery()
    assert peer.names() == []
    peer.feed(commands.Channel.CloseOk(), channel=1)
    call = peer.user.rpc(commands.Queue.Declare(queue="q", nowait=True))
    assert peer.names()[0] == (1, "Channel.Open")
    peer.feed(commands.Channel.OpenOk(), commands.Channel.CloseOk(), channel=1)
    assert call.result() is None
    await peer.lost()


class Consumption:
    """A user's consumer on a Peer."""

    def __init__(self) -> None:
        self.peer = Peer()
        self.consumer: AckingConsumer = self.peer.user.acking_consumer(
            "q", prefetch_size=0, prefetch_count=10
        )
        self.peer.feed(commands.Channel.OpenOk(), commands.Basic.QosOk(), channel=1)
        self.peer.taken()

    def deliver(self, *tags: int) -> None:
        for tag in tags:
            self.peer.feed(*delivery(tag, b"body"), channel=1)


async def test_message_that_comes_when_its_reader_is_cancelled_goes_to_the_next() -> None:
    bench = Consumption()
    readers = [asyncio.create_task(bench.consumer.next_delivery()) for _ in range(3)]
    await turn()
    bench.deliver(1, 2)  # wakes the first two
    readers[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await readers[0]
    assert [(await reader)[1] for reader in readers[1:]] == [1, 2]
    await bench.peer.lost()


async def test_readers_are_served_in_order() -> None:
    bench = Consumption()
    readers = [asyncio.create_task(bench.consumer.next_delivery()) for _ in range(3)]
    await turn()
    for tag in (1, 2, 3):
        bench.deliver(tag)
        assert (await readers[tag - 1])[1] == tag
    await bench.peer.lost()


async def test_polling_an_idle_queue_leaves_nothing_behind() -> None:
    bench = Consumption()
    for _ in range(50):
        reader = asyncio.create_task(bench.consumer.next_delivery())
        await turn()
        reader.cancel()
        await asyncio.wait([reader])
    assert not bench.consumer._waiters
    bench.deliver(1)
    assert await bench.consumer.next_delivery() == (b"body", 1)
    await bench.peer.lost()


async def test_delivery_in_many_frames_and_an_empty_one() -> None:
    bench = Consumption()
    body = bytes(range(256)) * 10
    bench.peer.feed(*delivery(1, body, pieces=7), *delivery(2, b""), channel=1)
    assert await bench.consumer.next_delivery() == (body, 1)
    assert await bench.consumer.next_delivery() == (b"", 2)
    await bench.peer.lost()


DELIVER = delivery(1, b"abc")[0]


@pytest.mark.parametrize(
    "frames",
    [
        [ContentHeader(body_size=3)],
        [ContentBody(b"x")],
        [DELIVER, ContentBody(b"x")],
        [DELIVER, ContentHeader(body_size=3), ContentHeader(body_size=3)],
        [DELIVER, DELIVER],
        [DELIVER, commands.Basic.QosOk()],
        [commands.Basic.Ack(1)],
        [commands.Queue.BindOk()],
    ],
)
async def test_frame_out_of_place_ends_the_connection(frames: list[Any]) -> None:
    bench = Consumption()
    bench.peer.feed(*frames, channel=1)
    assert [frame.reply_code for _, frame in bench.peer.taken()] == [505]
    assert isinstance(await bench.peer.protocol.closed, carehare.BadBytesFromServer)
    with pytest.raises(carehare.ConnectionClosed):
        await bench.consumer.next_delivery()


@pytest.mark.parametrize("frame", [commands.Queue.BindOk(), ContentBody(b"x"), Heartbeat()])
async def test_unexpected_answer_to_a_call_ends_the_connection(frame: Any) -> None:
    peer = Peer()
    call = peer.user.rpc(commands.Queue.Declare(queue="q", nowait=True))
    peer.taken()
    heartbeat_there = b"\x08\0\x01\0\0\0\0\xce"
    peer.feed(heartbeat_there if isinstance(frame, Heartbeat) else frame, channel=1)
    assert [frame.reply_code in (503, 505) for _, frame in peer.taken()] == [True]
    await peer.protocol.closed
    with pytest.raises(carehare.ConnectionClosed):
        await call


async def test_confirms_of_users_messages_in_any_order() -> None:
    peer = Peer()
    futures = [peer.user.publish(b"x", exchange_name="", routing_key="q") for _ in range(6)]
    futures[4].cancel()
    ack, nack = commands.Basic.Ack, commands.Basic.Nack
    peer.feed(commands.Channel.OpenOk(), nack(3), ack(2, multiple=True), channel=1)
    assert [future.done() for future in futures] == [True, True, True, False, True, False]
    # One that nobody knows, and one more than once.
    peer.feed(ack(99), ack(3), nack(6, multiple=True), channel=1)
    results = await asyncio.gather(*futures, return_exceptions=True)
    nacked = carehare.ServerSentNack
    types = [type(result) for result in results]
    assert types == [type(None), type(None), nacked, nacked, asyncio.CancelledError, nacked]
    assert not peer.transport.is_closing()
    await peer.lost()


@pytest.mark.parametrize("frame_max", [4096, 0])
@pytest.mark.parametrize("size", [0, 1, 4087, 4088, 4089, 10_000])
async def test_body_frames_of_users_fit_into_frame_max(frame_max: int, size: int) -> None:
    """carehare 1.0.2 leaves no room for the 8 bytes around them, and fails over "no limit"."""
    peer = Peer(frame_max=frame_max)
    body = bytes(n % 251 for n in range(size))
    peer.user.publish(body, exchange_name="", routing_key="q")
    frames = [frame for _, frame in peer.taken()]
    assert [plain(frame)[0] for frame in frames[:4]] == [
        "Channel.Open",
        "Confirm.Select",
        "Basic.Publish",
        "header",
    ]
    assert b"".join(frame.value for frame in frames[4:]) == body
    assert all(len(frame.value) <= (frame_max or 10**6) - 8 for frame in frames[4:])
    await peer.lost()


async def test_call_that_cannot_be_written_is_refused_and_harms_nobody() -> None:
    """Also when it would have to wait for an AMQP channel, which stays free."""
    peer = Peer(channel_max=1)
    for _ in range(2):
        bad = commands.Queue.Bind(queue="q", exchange="e", routing_key="x" * 256, nowait=True)
        with pytest.raises((TypeError, struct.error)):
            peer.user.rpc(bad)
        with pytest.raises(TypeError):
            peer.user.acking_consumer("q", prefetch_size=0, prefetch_count=10**6)
        good = peer.user.rpc(commands.Queue.Declare(queue="q", nowait=True))
        with pytest.raises((TypeError, struct.error)):
            peer.user.rpc(bad)
        peer.feed(commands.Channel.OpenOk(), commands.Channel.CloseOk(), channel=1)
        assert good.result() is None
    await peer.lost()


async def test_refused_exchange_fails_all_its_messages_and_no_others() -> None:
    peer = Peer()
    lost = [peer.user.publish(b"x", exchange_name="gone", routing_key="q") for _ in range(3)]
    other = peer.user.publish(b"x", exchange_name="there", routing_key="q")
    lost[0].cancel()
    peer.feed(commands.Channel.OpenOk(), close_channel(404, "NOT_FOUND - gone"), channel=1)
    for future in lost[1:]:
        with pytest.raises(carehare.ChannelClosedByServer, match="NOT_FOUND - gone"):
            await future
    peer.feed(commands.Channel.OpenOk(), commands.Basic.Ack(1), channel=2)
    assert other.result() is None
    again = peer.user.publish(b"x", exchange_name="gone", routing_key="q")
    peer.feed(commands.Channel.OpenOk(), commands.Basic.Ack(1), channel=1)
    assert again.result() is None
    await peer.lost()


@pytest.mark.parametrize(
    "frames", [content(b"x"), [commands.Basic.Return(312, "", "", "")], [commands.Basic.Cancel("")]]
)
async def test_unexpected_frame_on_an_exchanges_channel_ends_the_connection(
    frames: list[Any],
) -> None:
    peer = Peer()
    future = peer.user.publish(b"x", exchange_name="", routing_key="q")
    peer.taken()
    peer.feed(*frames, channel=1)
    assert [frame.reply_code for _, frame in peer.taken()] == [505]
    await peer.protocol.closed
    with pytest.raises(carehare.ConnectionClosed):
        await future


def _public(owner: type) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


def test_every_public_method_of_carehares_is_ours_and_called_as_there() -> None:
    """If this fails, a release of carehare has a method more, or another parameter."""
    assert issubclass(CarehareConnection, carehare.Connection)
    for name in {*_public(carehare.Connection), "__aenter__", "__aexit__"}:
        ours, theirs = vars(CarehareConnection)[name], vars(carehare.Connection)[name]
        if name in ("closed", "__aexit__"):
            continue
        expected = inspect.signature(theirs).parameters.values()
        found = inspect.signature(ours).parameters.values()
        assert [(each.name, each.kind, each.default) for each in found] == [
            (each.name, each.kind, each.default) for each in expected
        ], name


def test_nothing_of_carehares_own_protocol_is_imported() -> None:
    package = Path(channels_rabbitmq.__file__).parent
    private = re.compile(r"carehare\._|from carehare|import carehare\.")
    for path in package.rglob("*.py"):
        assert not private.search(path.read_text(encoding="utf-8")), path
