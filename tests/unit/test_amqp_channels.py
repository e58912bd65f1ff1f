"""The layer's AMQP channels: what they answer to what the broker says.

By hand-made frames where the order of things matters; on a real broker where its opinion does.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from typing import Any

import carehare
import pamqp.exceptions
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from channels_rabbitmq._amqp.protocol import Protocol, ProtocolError
from channels_rabbitmq._amqp.publishing import Outcome, Route
from tests.support.amqp_peer import (
    Peer,
    close_channel,
    close_connection,
    content,
    delivery,
    marshal,
    plain,
    returned,
)
from tests.support.deadlines import soon


def exception_of(future: asyncio.Future[Any]) -> BaseException | None:
    assert future.done()
    return future.exception()


def bind(n: int) -> Any:
    return commands.Queue.Bind(queue="q", exchange="e", routing_key=f"group{n}")


# Calls


async def test_answers_come_in_the_order_of_the_calls() -> None:
    peer = Peer()
    channel = peer.topology()
    calls = [channel.call(bind(n)) for n in range(3)]
    unbound = channel.call(commands.Queue.Unbind(queue="q", exchange="e", routing_key="g"))
    assert peer.names() == [(1, "Queue.Bind")] * 3 + [(1, "Queue.Unbind")]
    for n in range(3):
        peer.feed(commands.Queue.BindOk(), channel=1)
        assert [call.done() for call in calls] == [True] * (n + 1) + [False] * (2 - n)
        assert calls[n].result() is None
    peer.feed(commands.Queue.UnbindOk(), channel=1)
    assert unbound.done()


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (commands.Exchange.Declare(exchange="e"), commands.Exchange.DeclareOk()),
        (commands.Exchange.Unbind(destination="d", source="s"), commands.Exchange.UnbindOk()),
        (commands.Exchange.Bind(destination="d", source="s"), commands.Exchange.BindOk()),
        (commands.Queue.Declare(queue="q"), commands.Queue.DeclareOk("q", 0, 0)),
        (commands.Queue.Bind(queue="q", exchange="e"), commands.Queue.BindOk()),
        (commands.Queue.Unbind(queue="q", exchange="e"), commands.Queue.UnbindOk()),
        (commands.Basic.Qos(prefetch_count=1), commands.Basic.QosOk()),
        (commands.Basic.Consume(queue="q"), commands.Basic.ConsumeOk("channels")),
        (commands.Confirm.Select(), commands.Confirm.SelectOk()),
    ],
    ids=lambda frame: frame.name,
)
async def test_every_method_that_is_called_knows_its_answer(call: Any, answer: Any) -> None:
    peer = Peer()
    done = peer.topology().call(call)
    assert [plain(frame) for _, frame in peer.taken()] == [plain(call)]
    peer.feed(answer, channel=1)
    assert done.result() is None


async def test_cancelled_call_does_not_shift_the_answers() -> None:
    peer = Peer()
    channel = peer.topology()
    one, two = channel.call(bind(1)), channel.call(bind(2))
    one.cancel()
    peer.feed(commands.Queue.BindOk(), channel=1)
    assert not two.done()
    peer.feed(commands.Queue.BindOk(), channel=1)
    assert two.done()
    assert not peer.transport.is_closing()


@pytest.mark.parametrize(
    "frame",
    [
        commands.Queue.BindOk(),  # nobody called
        commands.Queue.DeclareOk("q", 0, 0),
        commands.Basic.Ack(1),
        commands.Basic.Deliver("channels", 1, False, "", ""),
        commands.Basic.Cancel("channels"),
        commands.Channel.OpenOk(),
        ContentHeader(body_size=1),
        ContentBody(b"x"),
    ],
    ids=lambda frame: frame.name,
)
async def test_unexpected_frame_ends_the_connection(frame: Any) -> None:
    peer = Peer()
    peer.topology()
    peer.feed(frame, channel=1)
    assert [plain(frame)[1]["reply_code"] for _, frame in peer.taken()] == [505]
    assert isinstance(await peer.protocol.closed, ProtocolError)


async def test_wrong_answer_ends_the_connection() -> None:
    peer = Peer()
    call = peer.topology().call(bind(1))
    peer.feed(commands.Queue.UnbindOk(), channel=1)
    await peer.protocol.closed
    assert isinstance(exception_of(call), carehare.ConnectionClosed)


async def test_refused_call_fails_with_the_brokers_words_and_ends_those_behind_it() -> None:
    peer = Peer()
    ended: list[Exception] = []
    channel = peer.consumer(on_end=ended.append)
    calls = [channel.call(bind(n)) for n in range(4)]
    peer.feed(commands.Queue.BindOk(), close_channel(404, "NOT_FOUND - no 'e'"), channel=1)
    assert calls[0].result() is None
    refused = exception_of(calls[1])
    assert isinstance(refused, carehare.ChannelClosedByServer)
    assert (refused.reply_code, refused.reply_text) == (404, "NOT_FOUND - no 'e'")
    assert [type(exception_of(call)) for call in calls[2:]] == [carehare.ChannelClosed] * 2
    assert ended == []  # The call has told.
    assert (1, "Channel.CloseOk") in peer.names()
    assert not peer.transport.is_closing()


async def test_a_consumer_closed_without_a_call_ends_in_the_brokers_words() -> None:
    peer = Peer()
    ended: list[Exception] = []
    channel = peer.consumer(on_end=ended.append)
    call = channel.call(bind(1))
    peer.feed(commands.Queue.BindOk(), close_channel(406, "PRECONDITION_FAILED - x"), channel=1)
    assert call.result() is None
    assert [type(exc) for exc in ended] == [carehare.ChannelClosedByServer]
    assert "406 PRECONDITION_FAILED - x" in str(ended[0])


async def test_end_of_the_connection_answers_all_calls() -> None:
    peer = Peer()
    channels = [peer.topology(), peer.consumer(), peer.publisher()]
    calls = [channel.call(bind(n)) for channel in channels for n in range(3)]
    await peer.lost(ConnectionResetError("reset"))
    assert {type(exception_of(call)) for call in calls} == {carehare.ConnectionClosed}
    assert "reset" in str(exception_of(calls[0]))


# TopologyChannel


async def test_one_refused_bind_fails_alone() -> None:
    """The broker has ignored those behind it: they are written again, on a new AMQP channel."""
    peer = Peer()
    channel = peer.topology()
    calls = [channel.call(bind(n)) for n in range(5)]
    peer.taken()
    peer.feed(commands.Queue.BindOk(), close_channel(), channel=1)
    assert calls[0].result() is None
    assert isinstance(exception_of(calls[1]), carehare.ChannelClosedByServer)
    assert not any(call.done() for call in calls[2:])
    close_ok, opened, *again = peer.taken()
    assert plain(close_ok[1])[0] == "Channel.CloseOk"
    assert plain(opened[1])[0] == "Channel.Open"
    assert [frame.routing_key for _, frame in again] == ["group2", "group3", "group4"]

    number = opened[0]
    peer.feed(commands.Channel.OpenOk(), commands.Queue.BindOk(), close_channel(), channel=number)
    assert calls[2].result() is None
    assert isinstance(exception_of(calls[3]), carehare.ChannelClosedByServer)
    last = [frame.routing_key for _, frame in peer.taken()[2:]]
    assert last == ["group4"]
    peer.feed(commands.Channel.OpenOk(), commands.Queue.BindOk(), channel=number)
    assert calls[4].result() is None


async def test_refusal_when_all_amqp_channels_are_in_use() -> None:
    """The number of the one that was closed is free again."""
    peer = Peer(channel_max=2)
    channel = peer.topology()
    peer.consumer()
    refused, behind = channel.call(bind(1)), channel.call(bind(2))
    peer.feed(close_channel(), channel=1)
    assert isinstance(exception_of(refused), carehare.ChannelClosedByServer)
    peer.feed(commands.Channel.OpenOk(), commands.Queue.BindOk(), channel=1)
    assert behind.result() is None


async def test_refusal_while_the_connection_closes_answers_all() -> None:
    peer = Peer()
    channel = peer.topology()
    calls = [channel.call(bind(n)) for n in range(3)]
    peer.protocol.send_close()
    peer.feed(close_channel(), channel=1)
    assert isinstance(exception_of(calls[0]), carehare.ChannelClosedByServer)
    assert {type(exception_of(call)) for call in calls[1:]} == {carehare.ConnectionClosed}
    await peer.lost()


# ConsumerChannel


class Deliveries:
    """What a consumer of a Peer's was given."""

    def __init__(self, **limits: int) -> None:
        self.peer = Peer(**limits)
        self.got: list[tuple[bytes, int]] = []
        self.ended: list[Exception] = []
        self.channel = self.peer.consumer(
            lambda body, tag, published, consumer: self.got.append((body, tag)), self.ended.append
        )

    def deliver(self, *tags: int) -> None:
        for tag in tags:
            self.peer.feed(*delivery(tag, b"body"), channel=1)

    async def acks(self) -> list[tuple[int, bool]]:
        await asyncio.sleep(0)  # lets the acks of this turn be written
        return [(frame.delivery_tag, frame.multiple) for _, frame in self.peer.taken()]


@pytest.mark.parametrize("pieces", [1, 2, 7])
async def test_deliveries_in_order_whatever_their_size(pieces: int) -> None:
    bench = Deliveries()
    bodies = [b"", b"x", bytes(range(256)) * 100, b""]
    for tag, body in enumerate(bodies, 1):
        bench.peer.feed(*delivery(tag, body, pieces=pieces), channel=1)
    assert bench.got == [(body, tag) for tag, body in enumerate(bodies, 1)]


async def test_empty_body_frames_are_allowed() -> None:
    bench = Deliveries()
    frames = delivery(1, b"ab", pieces=2)
    frames.insert(3, b"\x03\0\x01\0\0\0\0\xce")  # pamqp doesn't write such
    bench.peer.feed(*frames, channel=1)
    assert bench.got == [(b"ab", 1)]


def out_of_place() -> dict[str, list[Any]]:
    deliver, header, body = delivery(1, b"abc")
    return {
        "header alone": [header],
        "body alone": [body],
        "body before header": [deliver, body],
        "two headers": [deliver, header, header],
        "two deliveries": [deliver, deliver],
        "delivery amid bodies": [deliver, header, deliver],
        "answer amid a delivery": [deliver, commands.Basic.QosOk()],
        "body longer than announced": [deliver, header, ContentBody(b"abcd")],
        "body after an empty one": [deliver, ContentHeader(body_size=0), body],
        "heartbeat as body": [deliver, header, b"\x08\0\x01\0\0\0\0\xce"],
        "frame of unknown type as body": [deliver, header, b"\x05\0\x01\0\0\0\x03abc\xce"],
    }


@pytest.mark.parametrize("case", out_of_place())
async def test_content_out_of_place_ends_the_connection(case: str) -> None:
    bench = Deliveries()
    bench.peer.feed(*out_of_place()[case], channel=1)
    (_, close), *more = bench.peer.taken()
    assert close.name == "Connection.Close"
    assert close.reply_code == 505
    assert not more
    assert isinstance(await bench.peer.protocol.closed, ProtocolError)
    assert [body for body, _ in bench.got] in ([], [b""])


async def read_deliveries(pieces: Iterable[bytes], **limits: int) -> tuple[Any, ...]:
    """What comes of such bytes: bodies, what the broker is told, why the connection ended."""
    bench = Deliveries(**limits)
    for piece in pieces:
        if not bench.peer.transport.is_closing():
            bench.peer.protocol.data_received(piece)
    said = [(number, plain(frame)) for number, frame in bench.peer.taken()]
    await bench.peer.lost()
    return bench.got, said, repr(await bench.peer.protocol.closed)


async def test_damaged_deliveries_read_at_once_are_what_they_are_byte_by_byte() -> None:
    """A whole delivery is read in one go, which must find every fault that the other way finds."""
    stream = marshal(*delivery(1, b"one"), *delivery(2, b"two"), channel=1)
    stream += marshal(*delivery(3, b""), *delivery(4, b"four"), channel=1)
    assert await read_deliveries([stream]) == await read_deliveries([stream[:30], stream[30:]])
    for place in range(len(stream)):
        for change in (0x01, 0x02, 0x40, 0x80, 0xFF):
            damaged = bytearray(stream)
            damaged[place] ^= change
            at_once = await read_deliveries([bytes(damaged)])
            assert at_once == await read_deliveries(bytes([byte]) for byte in damaged), (
                f"byte {place}, changed by {change:#x}"
            )


@pytest.mark.parametrize(
    "rest",
    [
        marshal(*content(b"for another AMQP channel"), channel=2),
        marshal(*content(b"larger than agreed" * 300), channel=1),
        marshal(*content(b"header too large", headers={"h": "x" * 5000}), channel=1),
        b"\2\0\1\0\0\0\x0d\0\x3c" + bytes(10) + b"\1\xce\3\0\1\0\0\0\1x\xce",  # too small a header
    ],
)
async def test_what_was_not_agreed_is_found_at_once_too(rest: bytes) -> None:
    stream = marshal(delivery(1, b"")[0], rest, channel=1)
    at_once = await read_deliveries([stream], frame_max=4096)
    assert at_once == await read_deliveries((bytes([byte]) for byte in stream), frame_max=4096)
    assert not at_once[0]


@pytest.mark.parametrize("size", [20, 5000], ids=["too small for its tag", "larger than agreed"])
async def test_a_deliver_of_a_wrong_size_is_found_at_once_too(size: int) -> None:
    method = marshal(delivery(1, b"")[0], channel=1)[7:-1]
    payload = method[:size].ljust(size, b"\0")
    head = b"\1\0\1" + size.to_bytes(4, "big")
    stream = head + payload + b"\xce" + marshal(*content(b"body"), channel=1)
    at_once = await read_deliveries([stream], frame_max=4096)
    assert at_once == await read_deliveries((bytes([byte]) for byte in stream), frame_max=4096)
    assert not at_once[0]


@pytest.mark.parametrize("size", range(4))
async def test_truncated_delivery_ends_the_connection(size: int) -> None:
    bench = Deliveries()
    bench.peer.feed(b"\x01\0\x01\0\0\0" + bytes([size]) + b"\0\x3c\0\x3c"[:size] + b"\xce")
    assert [frame.reply_code for _, frame in bench.peer.taken()] == [502]
    assert isinstance(await bench.peer.protocol.closed, carehare.BadBytesFromServer)


async def test_acks_of_a_turn_are_written_together() -> None:
    bench = Deliveries()
    for tag in range(1, 6):
        bench.peer.feed(*delivery(tag, b""), channel=1)
    for tag in (1, 2, 3, 5):
        bench.channel.ack(tag)
    writes = bench.peer.transport.writes
    assert await bench.acks() == [(3, True), (5, False)]
    assert bench.peer.transport.writes == writes + 1
    bench.channel.ack(4)
    assert await bench.acks() == [(4, True)]


@pytest.mark.parametrize("pieces", [1, 2], ids=["whole", "of several frames"])
async def test_those_who_are_woken_by_a_read_ack_in_their_own_turn(pieces: int) -> None:
    bench = Deliveries()
    loop = asyncio.get_running_loop()
    bench.channel._on_delivery = lambda body, tag, published, consumer: loop.call_soon(
        consumer.ack, tag
    )
    await asyncio.sleep(0)  # lets what opened it be written
    writes = bench.peer.transport.writes
    both = [*delivery(1, b"body", pieces=pieces), *delivery(2, b"body")]
    bench.peer.feed(*both, channel=1)
    await asyncio.sleep(0)
    assert bench.peer.transport.writes == writes + 1
    assert await bench.acks() == [(2, True)]


async def test_nothing_is_acked_behind_the_brokers_farewell() -> None:
    """AMQP allows no frame after Connection.CloseOk, even for what came in the same read."""
    bench = Deliveries()
    bench.channel._on_delivery = lambda body, tag, published, consumer: consumer.ack(tag)
    bench.peer.protocol.data_received(
        marshal(*delivery(1, b"body"), channel=1) + marshal(close_connection())
    )
    await asyncio.sleep(0)  # lets the acks of this turn be written
    assert bench.peer.names() == [(0, "Connection.CloseOk")]


async def test_cancelled_consumer_reports_its_end_once() -> None:
    bench = Deliveries()
    bench.peer.feed(commands.Basic.Cancel("channels"), channel=1)
    assert [type(exc) for exc in bench.ended] == [carehare.ChannelClosed]
    bench.peer.feed(close_channel(406, "PRECONDITION_FAILED"), channel=1)
    await bench.peer.lost()
    assert len(bench.ended) == 1


async def test_closed_consumer_reports_its_end_once() -> None:
    bench = Deliveries()
    bench.peer.feed(close_channel(406, "PRECONDITION_FAILED - timeout"), channel=1)
    await bench.peer.lost()
    (exc,) = bench.ended
    assert isinstance(exc, carehare.ChannelClosedByServer)
    assert exc.reply_code == 406


async def test_end_of_the_connection_is_not_the_consumers_end() -> None:
    bench = Deliveries()
    await bench.peer.lost()
    assert not bench.ended


@pytest.mark.parametrize("end", [commands.Basic.Cancel("channels"), close_channel()])
async def test_acks_after_the_end_are_not_written(end: Any) -> None:
    """Neither those collected in the same turn: the number may be another channel's by now."""
    bench = Deliveries()
    bench.deliver(1, 2)
    bench.channel.ack(1)
    bench.peer.feed(end, channel=1)
    bench.peer.taken()
    assert await bench.acks() == []
    bench.channel.ack(2)
    assert await bench.acks() == []


async def test_muted_consumer_hands_out_and_acks_nothing_more() -> None:
    """Its connection is given up, and the messages go to the next one's queue, or nowhere."""
    bench = Deliveries()
    bench.deliver(1)
    bench.channel.ack(1)
    bench.channel.detach()
    bench.deliver(2)
    assert bench.got == [(b"body", 1)]
    assert await bench.acks() == []
    assert not bench.ended


async def test_acks_after_the_end_of_the_connection_do_nothing() -> None:
    bench = Deliveries()
    bench.deliver(1, 2)
    bench.channel.ack(1)
    await bench.peer.lost()
    bench.channel.ack(2)
    await asyncio.sleep(0)  # lets them be written, if they were
    assert bench.peer.transport.written == b""


# PublisherChannel


class Publications:
    """A publisher on a Peer."""

    def __init__(self) -> None:
        self.peer = Peer()
        self.ended: list[Exception] = []
        self.channel = self.peer.publisher(self.ended.append)

    def publish(
        self, count: int, *, routing_key: str = "key", deadline: float | None = None
    ) -> list[Any]:
        route = Route("e", routing_key, mandatory=True)
        deadline = soon() if deadline is None else deadline
        return [self.channel.publish(b"body", route, deadline) for _ in range(count)]

    def feed(self, *frames: Any) -> None:
        self.peer.feed(*frames, channel=1)


def outcomes(futures: list[Any]) -> list[Outcome | None]:
    return [future.result() if future.done() else None for future in futures]


CONFIRMED, REFUSED, RETURNED, UNKNOWN = (
    Outcome.CONFIRMED,
    Outcome.NACKED,
    Outcome.RETURNED,
    Outcome.UNKNOWN,
)


async def test_confirms_in_any_order() -> None:
    for order in itertools.permutations((1, 2, 3)):
        bench = Publications()
        futures = bench.publish(3)
        for tag in order:
            bench.feed(commands.Basic.Nack(tag) if tag == 2 else commands.Basic.Ack(tag))
        assert outcomes(futures) == [CONFIRMED, REFUSED, CONFIRMED]
        assert bench.channel.unconfirmed == 0
        await bench.peer.lost()


async def test_messages_that_go_together_are_written_together() -> None:
    bench = Publications()
    transport = bench.peer.transport

    def writes_of_a_turn(count: int) -> int:
        before = transport.writes
        bench.publish(count)
        names = [frame.name for _, frame in bench.peer.taken()]
        assert names.count("Basic.Publish") == count
        bench.feed(commands.Basic.Ack(1000, multiple=True))
        return transport.writes - before

    assert writes_of_a_turn(3) == 2  # The first one went at once.
    assert [writes_of_a_turn(3) for _ in range(3)] == [1, 1, 1]
    assert [writes_of_a_turn(1) for _ in range(3)] == [1, 1, 1]
    await bench.peer.lost()


@pytest.mark.parametrize("size", [1, 10_000])
async def test_message_that_is_alone_is_written_at_once(size: int) -> None:
    bench = Publications()
    transport = bench.peer.transport
    route = Route("e", "key", mandatory=True)

    def writes_at_once() -> int:
        before = transport.writes
        bench.channel.publish(bytes(size), route, soon())
        return transport.writes - before

    for number in range(1, 4):
        assert writes_at_once() == 1
        bench.feed(commands.Basic.Ack(number))
    assert writes_at_once() == 1
    assert writes_at_once() == 0  # while the other is under way
    bench.feed(commands.Basic.Ack(5, multiple=True))
    assert writes_at_once() == 0  # The last one had company.
    bench.feed(commands.Basic.Ack(6))
    bench.peer.taken()
    assert writes_at_once() == 1
    await bench.peer.lost()


async def test_multiple_means_all_up_to_it_that_are_outstanding() -> None:
    bench = Publications()
    futures = bench.publish(7)
    bench.feed(commands.Basic.Ack(2))
    bench.feed(commands.Basic.Nack(3, multiple=True))
    assert outcomes(futures) == [REFUSED, CONFIRMED, REFUSED, None, None, None, None]
    bench.feed(commands.Basic.Ack(6, multiple=True))
    assert outcomes(futures)[3:] == [CONFIRMED] * 3 + [None]
    assert bench.channel.unconfirmed == 1
    await bench.peer.lost()


@pytest.mark.parametrize("confirm", [commands.Basic.Ack, commands.Basic.Nack])
async def test_return_with_others_confirms_between_it_and_its_own(confirm: Any) -> None:
    bench = Publications()
    futures = bench.publish(4)
    bench.feed(*returned(b"body", correlation_id="2"))
    assert outcomes(futures) == [None] * 4
    bench.feed(commands.Basic.Ack(1))
    bench.feed(confirm(4))
    bench.feed(commands.Basic.Ack(3, multiple=True))
    other = CONFIRMED if confirm is commands.Basic.Ack else REFUSED
    assert outcomes(futures) == [CONFIRMED, RETURNED, CONFIRMED, other]


async def test_returned_body_in_many_frames_and_none() -> None:
    bench = Publications()
    futures = bench.publish(2)
    method = commands.Basic.Return(312, "NO_ROUTE", "e", "key")
    bench.feed(method, *content(b"x" * 1000, pieces=10, correlation_id="1"))
    bench.feed(method, *content(b"", correlation_id="2"))
    bench.feed(commands.Basic.Ack(2, multiple=True))
    assert outcomes(futures) == [RETURNED] * 2


async def test_return_is_told_also_when_the_broker_has_added_properties() -> None:
    bench = Publications()
    futures = bench.publish(1)
    bench.feed(*returned(b"body", correlation_id="1", headers={"timestamp_in_ms": 1}))
    bench.feed(commands.Basic.Ack(1))
    assert outcomes(futures) == [RETURNED]


@pytest.mark.parametrize("correlation_id", [None, "99", "x"])
async def test_return_of_an_unknown_message_is_ignored(correlation_id: str | None) -> None:
    bench = Publications()
    futures = bench.publish(1)
    bench.feed(*returned(b"body", correlation_id=correlation_id))
    bench.feed(commands.Basic.Ack(1))
    assert outcomes(futures) == [CONFIRMED]
    assert not bench.peer.transport.is_closing()


@pytest.mark.parametrize(
    "frames",
    [
        content(b"abc"),
        [*returned(b"abc", correlation_id="1"), ContentBody(b"abc")],
        [*returned(b"", correlation_id="1"), *content(b"abc")],
        [returned(b"abc")[0], ContentBody(b"abc")],
        [returned(b"abc")[0], commands.Basic.Ack(1)],
        [*returned(b"abc")[:2], ContentBody(b"abcd")],
    ],
)
async def test_returned_content_out_of_place_ends_the_connection(frames: list[Any]) -> None:
    bench = Publications()
    futures = bench.publish(1)
    bench.peer.taken()
    bench.feed(*frames)
    assert [frame.reply_code for _, frame in bench.peer.taken()] == [505]
    await bench.peer.protocol.closed
    assert outcomes(futures) in ([UNKNOWN], [RETURNED])


async def test_message_unanswered_at_its_deadline_is_unknown_and_its_late_confirm_ignored() -> None:
    bench = Publications()
    (early,) = bench.publish(1, deadline=asyncio.get_running_loop().time() + 0.01)
    (later,) = bench.publish(1)
    assert await early is UNKNOWN
    assert bench.channel.unconfirmed == 1
    bench.feed(*returned(b"body", correlation_id="1"), commands.Basic.Ack(1))
    assert outcomes([later]) == [None]
    bench.feed(commands.Basic.Ack(2))
    assert outcomes([later]) == [CONFIRMED]
    assert not bench.peer.transport.is_closing()


async def test_late_multiple_confirm_settles_the_rest() -> None:
    bench = Publications()
    now = asyncio.get_running_loop().time()
    early = bench.publish(2, deadline=now + 0.005) + bench.publish(1, deadline=now + 0.01)
    later = bench.publish(2)
    await asyncio.wait(early)
    assert outcomes(early + later) == [UNKNOWN] * 3 + [None] * 2
    bench.feed(commands.Basic.Nack(5, multiple=True))
    assert outcomes(later) == [REFUSED] * 2


async def test_deadlines_in_any_order() -> None:
    """A call that waited for the connection has less time left than those before it."""
    bench = Publications()
    now = asyncio.get_running_loop().time()
    deadlines = [now + 60, now + 0.01, now + 0.005, now + 60, now + 0.005]
    futures = [bench.publish(1, deadline=deadline)[0] for deadline in deadlines]
    await asyncio.wait([futures[1]], timeout=5)
    assert outcomes(futures) == [None, UNKNOWN, UNKNOWN, None, UNKNOWN]
    bench.feed(commands.Basic.Ack(4, multiple=True))
    assert outcomes(futures) == [CONFIRMED, UNKNOWN, UNKNOWN, CONFIRMED, UNKNOWN]
    await bench.peer.lost()


async def test_deadline_in_the_past() -> None:
    bench = Publications()
    (future,) = bench.publish(1, deadline=asyncio.get_running_loop().time() - 1)
    assert await future is UNKNOWN


async def test_deadlines_go_on_after_all_was_confirmed() -> None:
    bench = Publications()
    loop = asyncio.get_running_loop()
    bench.publish(1, deadline=loop.time() + 0.005)
    bench.feed(commands.Basic.Ack(1))
    (second,) = bench.publish(1, deadline=loop.time() + 0.01)
    assert await second is UNKNOWN


async def test_deadlines_go_on_after_one_had_passed() -> None:
    bench = Publications()
    loop = asyncio.get_running_loop()
    (first,) = bench.publish(1, deadline=loop.time() + 0.001)
    assert await first is UNKNOWN
    (second,) = bench.publish(1, deadline=loop.time() + 0.01)
    assert await asyncio.wait_for(second, 10) is UNKNOWN


async def test_cancelled_publication_harms_no_other() -> None:
    bench = Publications()
    futures = bench.publish(4)
    futures[1].cancel()
    futures[2].cancel()
    bench.feed(commands.Basic.Ack(2))
    bench.feed(commands.Basic.Ack(4, multiple=True))
    assert [outcomes([future]) for future in (futures[0], futures[3])] == [[CONFIRMED]] * 2
    assert not bench.peer.transport.is_closing()


async def test_cancelled_publication_that_expires_and_one_that_is_lost() -> None:
    bench = Publications()
    now = asyncio.get_running_loop().time()
    one, two = bench.publish(2, deadline=now + 0.001)
    one.cancel()
    await two
    (three,) = bench.publish(1)
    three.cancel()
    await bench.peer.lost()


async def test_closed_channel_leaves_the_outcome_unknown() -> None:
    """But for what the broker had returned already."""
    bench = Publications()
    futures = bench.publish(3)
    bench.feed(*returned(b"body", correlation_id="2"))
    bench.feed(close_channel(404, "NOT_FOUND - no exchange"))
    assert outcomes(futures) == [UNKNOWN, RETURNED, UNKNOWN]
    (exc,) = bench.ended
    assert isinstance(exc, carehare.ChannelClosedByServer)
    bench.peer.taken()
    assert outcomes(bench.publish(1)) == [UNKNOWN]
    assert bench.peer.taken() == []


async def test_end_of_the_connection_leaves_the_outcome_unknown() -> None:
    bench = Publications()
    futures = bench.publish(2)
    bench.feed(*returned(b"body", correlation_id="1"))
    await bench.peer.lost()
    assert outcomes(futures) == [RETURNED, UNKNOWN]
    assert not bench.ended
    assert bench.channel.unconfirmed == 0


async def test_what_cannot_be_encoded_is_not_counted() -> None:
    """The broker doesn't count it either: later confirms must fit."""
    bench = Publications()
    with pytest.raises(ValueError, match="range"):
        bench.publish(1, routing_key="x" * 256)
    assert bench.channel.unconfirmed == 0
    futures = bench.publish(2)
    header = [frame for _, frame in bench.peer.taken() if isinstance(frame, ContentHeader)]
    assert [frame.properties.correlation_id for frame in header] == ["1", "2"]
    bench.feed(commands.Basic.Nack(1), commands.Basic.Ack(2))
    assert outcomes(futures) == [REFUSED, CONFIRMED]


@pytest.mark.parametrize("size", [0, 1, 4087, 4088, 4089, 2 * 4088, 2 * 4088 + 1, 50_000])
async def test_body_frames_fit_into_frame_max(size: int) -> None:
    peer = Peer(frame_max=4096)
    body = bytes(n % 251 for n in range(size))
    peer.publisher().publish(body, Route("e", "key", mandatory=False), soon())
    _, (_, header), *bodies = peer.taken()
    assert header.body_size == size
    assert b"".join(frame.value for _, frame in bodies) == body
    assert all(len(frame.value) <= 4096 - 8 for _, frame in bodies)
    await peer.lost()


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, int]]:
    """What the broker says about ten messages: confirms of any kind, returns before their own."""
    said: list[tuple[str, int]] = []
    open_tags = list(range(1, 11))
    unreturned = set(open_tags)
    while open_tags:
        what = draw(st.sampled_from(["ack", "nack", "ack all", "nack all", "return"]))
        if what == "return":
            candidates = sorted(unreturned & set(open_tags))
            if candidates:
                tag = draw(st.sampled_from(candidates))
                unreturned.discard(tag)
                said.append((what, tag))
            continue
        tag = draw(st.sampled_from(open_tags))
        said.append((what, tag))
        open_tags = [
            other for other in open_tags if other != tag and (other > tag or "all" not in what)
        ]
    return said


@given(conversations())
async def test_every_message_has_the_outcome_that_the_broker_told(
    said: list[tuple[str, int]],
) -> None:
    bench = Publications()
    futures = bench.publish(10)
    expected: dict[int, Outcome] = {}
    was_returned: set[int] = set()
    for what, tag in said:
        is_multiple = what.endswith("all")
        if what == "return":
            bench.feed(*returned(b"body", correlation_id=str(tag)))
            was_returned.add(tag)
            continue
        if what.startswith("ack"):
            bench.feed(commands.Basic.Ack(tag, is_multiple))
        else:
            bench.feed(commands.Basic.Nack(tag, is_multiple))
        for told in range(1 if is_multiple else tag, tag + 1):
            plain_outcome = CONFIRMED if what.startswith("ack") else REFUSED
            expected.setdefault(told, RETURNED if told in was_returned else plain_outcome)
        assert outcomes(futures) == [expected.get(tag) for tag in range(1, 11)]
    assert bench.channel.unconfirmed == 0
    await bench.peer.lost()


async def test_content_channel_that_broke_the_protocol_is_one_kind_of_error() -> None:
    """pamqp's own errors don't come out: the readers of ``closed`` know carehare's."""
    peer = Peer()
    peer.topology()
    peer.feed(commands.Basic.Ack(1), channel=1)
    reason = await peer.protocol.closed
    assert isinstance(reason, carehare.BadBytesFromServer)
    assert "broke the protocol" in str(reason)
    assert not issubclass(ProtocolError, pamqp.exceptions.PAMQPException)
    assert isinstance(peer.protocol, Protocol)


async def test_close_from_the_broker_ends_all_channels() -> None:
    peer = Peer()
    bench = peer.publisher()
    call = peer.topology().call(bind(1))
    future = bench.publish(b"x", Route("e", "k", mandatory=False), soon())
    peer.taken()
    peer.feed(close_connection(320, "CONNECTION_FORCED - bye"))
    exc = await peer.protocol.closed
    assert isinstance(exc, carehare.ConnectionClosedByServer)
    assert await future is UNKNOWN
    assert "CONNECTION_FORCED - bye" in str(exception_of(call))
