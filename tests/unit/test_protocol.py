"""The Protocol by itself: bytes, handshake and end, with the test as the broker."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

import carehare
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from channels_rabbitmq._amqp import protocol as protocol_module
from channels_rabbitmq._amqp.channel import CallChannel
from channels_rabbitmq._amqp.consuming import ConsumerChannel
from channels_rabbitmq._amqp.protocol import ProtocolError
from channels_rabbitmq._amqp.publishing import Outcome, Route
from tests.support.amqp_peer import (
    START,
    Peer,
    close_channel,
    close_connection,
    content,
    delivery,
    marshal,
    plain,
    returned,
    tune,
    unmarshal,
)
from tests.support.deadlines import soon

OPEN_OK = commands.Connection.OpenOk()

# AMQP 0-9-1, section 1.2: connection errors (hard errors), less 541 INTERNAL_ERROR, a bug of ours.
HARD_ERRORS = {501, 502, 503, 504, 505, 506, 530, 540}


# Handshake


async def test_handshake_names_the_connection_and_what_the_client_understands() -> None:
    peer = Peer("amqp://al%69ce:p%40ss@broker/v%2Fhost", is_open=False, connection_name="crq.x me")
    header, *none = peer.taken()
    assert plain(header[1]) == "ProtocolHeader"
    assert not none
    peer.feed(START)
    ((channel, start_ok),) = peer.taken()
    assert channel == 0
    assert start_ok.mechanism == "PLAIN"
    assert start_ok.response == "\0alice\0p@ss"
    assert start_ok.client_properties["connection_name"] == "crq.x me"
    assert start_ok.client_properties["product"] == "channels_rabbitmq"
    assert start_ok.client_properties["capabilities"] == {
        "authentication_failure_close": True,
        "basic.nack": True,
        "connection.blocked": True,
        "consumer_cancel_notify": True,
        "publisher_confirms": True,
    }
    peer.feed(tune())
    (_, tune_ok), (_, opening) = peer.taken()
    assert tune_ok.name == "Connection.TuneOk"
    assert opening.virtual_host == "v/host"
    assert not peer.protocol.open.done()
    peer.feed(OPEN_OK)
    assert peer.protocol.open.result() is None
    await peer.lost()


@pytest.mark.parametrize(
    ("query", "offered", "agreed"),
    [
        ("", 60, 20),  # our default
        ("", 10, 10),
        ("", 0, 20),
        ("?heartbeat=5", 60, 5),
        ("?heartbeat=5", 0, 5),
        ("?heartbeat=90", 60, 60),
        ("?heartbeat=0", 60, 0),
        ("?heartbeat=0", 0, 0),
    ],
)
async def test_heartbeat_is_the_smaller_of_both_sides_wishes(
    query: str, offered: int, agreed: int
) -> None:
    """An operator's 0 means that the broker doesn't ask for any; ours that there are none."""
    peer = Peer(f"amqp://broker{query}", is_open=False)
    peer.feed(START, tune(heartbeat=offered))
    tune_ok = peer.taken()[2][1]
    assert tune_ok.heartbeat == agreed
    await peer.lost()


@pytest.mark.parametrize(
    ("query", "offered", "agreed"),
    [
        ("", 2047, 2047),
        ("", 0, 0),
        ("?channel_max=10", 2047, 10),
        ("?channel_max=10", 0, 10),
        ("?channel_max=3000", 2047, 2047),
        ("?channel_max=0", 2047, 2047),
    ],
)
async def test_channel_max_is_the_smaller_of_both_sides_wishes(
    query: str, offered: int, agreed: int
) -> None:
    peer = Peer(f"amqp://broker{query}", is_open=False)
    peer.feed(START, tune(channel_max=offered), OPEN_OK)
    assert peer.taken()[2][1].channel_max == agreed
    numbers = [peer.topology()._amqp_channel_id for _ in range(min(agreed or 5000, 5000))]
    assert numbers == list(range(1, len(numbers) + 1))
    if agreed:
        with pytest.raises(carehare.ChannelClosed, match="in use"):
            peer.topology()
    await peer.lost()


@pytest.mark.parametrize("frame_max", [0, 4096, 131072])
async def test_frame_max_is_echoed(frame_max: int) -> None:
    """RabbitMQ 4.1 refuses a client that asks for less than 8192."""
    peer = Peer(is_open=False)
    peer.feed(START, tune(frame_max=frame_max))
    assert peer.taken()[2][1].frame_max == frame_max
    assert peer.protocol.frame_max == frame_max
    await peer.lost()


async def test_login_by_password_not_offered() -> None:
    peer = Peer(is_open=False)
    peer.feed(commands.Connection.Start(mechanisms="EXTERNAL AMQPLAIN"))
    await peer.protocol.closed
    with pytest.raises(carehare.ConnectionClosed, match="PLAIN"):
        await peer.protocol.open


OUT_OF_TURN: dict[str, list[Any]] = {
    "tune first": [tune()],
    "open-ok first": [OPEN_OK],
    "start twice": [START, START],
    "open-ok without tune": [START, OPEN_OK],
    "tune twice": [START, tune(heartbeat=60), tune(heartbeat=60)],
    "start when open": [START, tune(), OPEN_OK, START],
    "tune when open": [START, tune(heartbeat=60), OPEN_OK, tune(heartbeat=60)],
    "open-ok when open": [START, tune(), OPEN_OK, OPEN_OK],
    "something else": [START, commands.Connection.Secure("x")],
    "a channel's method": [START, tune(), commands.Channel.OpenOk()],
    "a message": [START, tune(), ContentBody(b"x")],
    "tiny frame_max": [START, tune(frame_max=9)],
}


@pytest.mark.parametrize("case", OUT_OF_TURN)
async def test_handshake_out_of_turn_ends_the_connection(case: str) -> None:
    peer = Peer(is_open=False)
    peer.feed(*OUT_OF_TURN[case])
    is_open = peer.protocol.open.done()
    said = [frame for _, frame in peer.taken() if plain(frame)[0] == "Connection.Close"]
    # AMQP 0-9-1, section 2.2.4: no good-bye before the connection is open.
    assert [frame.reply_code in HARD_ERRORS for frame in said] == [True] * is_open
    assert isinstance(await peer.protocol.closed, ProtocolError)
    assert peer.protocol.open.done()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
        b"AMQP\0\0\x09\x01",  # RabbitMQ's answer to a version it doesn't speak
        b"-ERR unknown command 'AMQP'\r\n",
        b"220 mail ready\r\n",
    ],
)
async def test_server_that_speaks_another_protocol(answer: bytes) -> None:
    peer = Peer(is_open=False)
    peer.feed(answer)
    await peer.protocol.closed
    with pytest.raises(carehare.BadBytesFromServer):
        await peer.protocol.open


async def test_refused_login_is_told_by_the_brokers_words() -> None:
    peer = Peer(is_open=False)
    peer.feed(START, close_connection(403, "ACCESS_REFUSED - Login was refused"))
    with pytest.raises(carehare.ConnectionClosedByServer, match="403 ACCESS_REFUSED"):
        await peer.protocol.open
    assert isinstance(await peer.protocol.closed, carehare.ConnectionClosedByServer)


async def test_no_password_and_no_body_in_the_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    peer = Peer("amqp://guest:hush-hush@broker?heartbeat=0")
    peer.user.publish(b"private body", exchange_name="", routing_key="q")
    consumer = peer.user.acking_consumer("q", prefetch_size=0, prefetch_count=1)
    peer.feed(commands.Channel.OpenOk(), *delivery(1, b"private body"), channel=2)
    assert await consumer.next_delivery() == (b"private body", 1)
    peer.feed(commands.Queue.BindOk(), ContentBody(b"private body"), channel=2)
    await peer.protocol.closed
    everything = caplog.text + repr(peer.protocol) + repr(vars(peer.protocol))
    assert "private" not in caplog.text + str(peer.protocol.closed.result())
    assert "hush" not in everything


# Bytes


class Talk:
    """What a broker says to three channels, and what came of it."""

    def __init__(self) -> None:
        self.peer = Peer()
        self.got: list[tuple[bytes, int]] = []
        self.ended: list[Exception] = []
        self.consumer = self.peer.consumer(
            lambda body, tag, published, consumer: self.got.append((body, tag)), self.ended.append
        )
        self.topology = self.peer.topology()
        self.publisher = self.peer.publisher(self.ended.append)
        self.calls = [
            self.topology.call(commands.Queue.Bind(queue="q", exchange="e")) for _ in range(2)
        ]
        self.told = [
            self.publisher.publish(b"body", Route("e", "key", mandatory=True), soon())
            for _ in range(3)
        ]
        self.peer.taken()

    @staticmethod
    def data() -> bytes:
        return b"".join(
            [
                marshal(*delivery(1, b"first"), channel=1),
                marshal(commands.Queue.BindOk(), channel=2),
                marshal(Heartbeat()),
                marshal(commands.Basic.Ack(1), channel=3),
                marshal(*delivery(2, b"in three pieces", pieces=3), channel=1),
                marshal(*returned(b"body", correlation_id="3"), channel=3),
                marshal(commands.Connection.Blocked("low on memory")),
                marshal(*delivery(3, b""), channel=1),
                marshal(commands.Basic.Nack(2), channel=3),
                marshal(commands.Queue.BindOk(), channel=2),
                marshal(commands.Basic.Ack(3, True), channel=3),
            ]
        )

    def result(self) -> Any:
        return (
            self.got,
            self.peer.blocked,
            [call.done() for call in self.calls],
            [future.result() if future.done() else None for future in self.told],
        )

    EXPECTED: Any = (
        [(b"first", 1), (b"in three pieces", 2), (b"", 3)],
        ["low on memory"],
        [True, True],
        [Outcome.CONFIRMED, Outcome.NACKED, Outcome.RETURNED],
    )


async def test_many_frames_in_one_read() -> None:
    talk = Talk()
    talk.peer.protocol.data_received(Talk.data())
    assert talk.result() == Talk.EXPECTED
    await talk.peer.lost()


async def test_frames_byte_by_byte() -> None:
    talk = Talk()
    for byte in Talk.data():
        talk.peer.protocol.data_received(bytes([byte]))
    assert talk.result() == Talk.EXPECTED
    await talk.peer.lost()


async def test_frames_split_at_every_position() -> None:
    data = Talk.data()
    for position in range(len(data) + 1):
        talk = Talk()
        talk.peer.protocol.data_received(data[:position])
        talk.peer.protocol.data_received(data[position:])
        assert talk.result() == Talk.EXPECTED
        await talk.peer.lost()


@given(st.lists(st.integers(0, len(Talk.data())), max_size=30))
async def test_frames_in_any_pieces(cuts: list[int]) -> None:
    data, talk = Talk.data(), Talk()
    edges = [0, *sorted(cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        talk.peer.protocol.data_received(data[begin:end])
    assert talk.result() == Talk.EXPECTED
    await talk.peer.lost()


async def test_large_body_in_many_frames_and_reads() -> None:
    talk = Talk()
    body = bytes(range(256)) * 20_000
    data = marshal(*delivery(1, body, pieces=40), channel=1)
    for at in range(0, len(data), 65_536):
        talk.peer.protocol.data_received(data[at : at + 65_536])
    assert talk.got == [(body, 1)]
    await talk.peer.lost()


@pytest.mark.parametrize("frame_max", [4096, 131072])
async def test_frame_of_frame_max_is_taken(frame_max: int) -> None:
    got: list[bytes] = []
    peer = Peer(frame_max=frame_max)
    peer.consumer(lambda body, tag, published, consumer: got.append(body))
    body = b"x" * (frame_max - 8)
    peer.feed(*delivery(1, body), channel=1)
    assert got == [body]
    await peer.lost()


def head(frame_type: int, channel: int, size: int) -> bytes:
    return bytes([frame_type]) + channel.to_bytes(2, "big") + size.to_bytes(4, "big")


DAMAGED: dict[str, tuple[bytes, int]] = {
    "wrong frame end": (marshal(Heartbeat())[:-1] + b"\0", 501),
    "wrong frame end of a delivery": (marshal(delivery(1, b"")[0], channel=1)[:-1] + b"\0", 501),
    "frame larger than agreed": (head(3, 1, 131073), 501),
    "frame of gigabytes": (head(1, 0, 2**32 - 1), 501),
    "unknown frame type": (head(4, 1, 1) + b"x\xce", 505),
    "unknown frame type on no channel": (head(200, 0, 1) + b"x\xce", 502),
    "method that ends too early": (head(1, 1, 2) + b"\0\x3c\xce", 502),
    "empty method": (head(1, 2, 0) + b"\xce", 502),
    "method of channel 0 that ends too early": (head(1, 0, 4) + b"\0\x0a\0\x32\xce", 502),
    "ack that ends too early": (head(1, 3, 8) + b"\0\x3c\0\x50\0\0\0\0\xce", 502),
    "nack that ends too early": (head(1, 3, 12) + b"\0\x3c\0\x78" + bytes(8) + b"\xce", 502),
    "delivery that ends too early": (head(1, 1, 6) + b"\0\x3c\0\x3c\x01c\xce", 502),
    "delivery with a longer tag than frame": (head(1, 1, 5) + b"\0\x3c\0\x3c\xff\xce", 502),
    "header that ends too early": (
        marshal(delivery(1, b"")[0], channel=1) + head(2, 1, 4) + b"\0\x3c\0\0\xce",
        502,
    ),
    "returned header that ends too early": (
        marshal(returned(b"")[0], channel=3) + head(2, 3, 13) + b"\0\x3c" + bytes(11) + b"\xce",
        502,
    ),
    "correlation-id longer than its header": (
        marshal(returned(b"")[0], channel=3)
        + head(2, 3, 16)
        + b"\0\x3c\0\0"
        + bytes(8)
        + b"\x04\0\xff1"
        + b"\xce",
        502,
    ),
    "unknown method": (head(1, 1, 4) + b"\xff\xff\xff\xff\xce", 502),
    "method on a channel that isn't open": (marshal(commands.Basic.Ack(1), channel=9), 504),
    "content on a channel that isn't open": (marshal(*content(b"x"), channel=9), 504),
    "close of a channel that isn't open": (marshal(close_channel(), channel=9), 504),
    "close-ok for no close": (marshal(commands.Channel.CloseOk(), channel=1), 504),
    "close-ok on channel 0": (marshal(commands.Channel.CloseOk()), 504),
    "message on channel 0": (marshal(*content(b"x")), 504),
    "client's method": (marshal(commands.Basic.Get(), channel=2), 505),
    "client's method with a table": (marshal(commands.Queue.Declare(), channel=2), 502),
    "connection's method on a channel": (marshal(commands.Connection.Blocked("x"), channel=1), 503),
    "close of the connection on a channel": (marshal(close_connection(), channel=1), 503),
    "heartbeat on a channel": (marshal(Heartbeat())[:2] + b"\x02" + marshal(Heartbeat())[3:], 503),
    "header out of place": (marshal(ContentHeader(body_size=1), channel=1), 505),
    "body out of place": (marshal(ContentBody(b"x"), channel=3), 505),
    "ack to a consumer": (marshal(commands.Basic.Ack(1), channel=1), 505),
    "delivery to a publisher": (marshal(*delivery(1, b""), channel=3), 505),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("in_pieces", [False, True])
async def test_damaged_frame_ends_the_connection_with_amqps_code(
    case: str, in_pieces: bool
) -> None:
    """And everybody who waits is answered; carehare 1.0.2 stays, and is deaf from then on."""
    talk = Talk()
    data, reply_code = DAMAGED[case]
    good_before = marshal(*delivery(1, b"good"), channel=1)
    # What comes behind mustn't be read, nor help to read the damaged frame.
    data = good_before + data + Talk.data()
    for piece in [data[at : at + 1] for at in range(len(data))] if in_pieces else [data]:
        talk.peer.protocol.data_received(piece)
    goodbye = talk.peer.taken()
    assert [frame.name for _, frame in goodbye] == ["Connection.Close"]
    assert [frame.reply_code for _, frame in goodbye] == [reply_code]
    exc = await talk.peer.protocol.closed
    assert isinstance(exc, carehare.BadBytesFromServer)
    assert talk.got == [(b"good", 1)]
    assert all(call.done() for call in talk.calls)
    assert [future.result() for future in talk.told] == [Outcome.UNKNOWN] * 3


mutations = st.lists(
    st.tuples(
        st.sampled_from(["change", "insert", "remove", "cut off", "repeat"]),
        st.integers(0, len(Talk.data()) - 1),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)


def mutate(data: bytes, mutation: tuple[str, int, bytes]) -> bytes:
    how, at, new = mutation
    if how == "change":
        return data[:at] + new + data[at + len(new) :]
    if how == "insert":
        return data[:at] + new + data[at:]
    if how == "remove":
        return data[:at] + data[at + len(new) :]
    if how == "repeat":
        return data[:at] + data[max(0, at - 10 * len(new)) :]
    return data[:at]


@given(mutations, st.integers(1, 100))
async def test_random_damage_never_goes_unhandled(
    mutations: list[tuple[str, int, bytes]], piece: int
) -> None:
    """The connection goes on or ends, by AMQP's code; what was whole before has arrived."""
    talk = Talk()
    data = Talk.data()
    intact = len(data)
    for mutation in mutations:
        data = mutate(data, mutation)
        intact = min(intact, mutation[1])
    for at in range(0, len(data), piece):
        talk.peer.protocol.data_received(data[at : at + piece])

    reference = Talk()
    before = Talk.data()[:intact]
    reference.peer.protocol.data_received(before)
    assert talk.got[: len(reference.got)] == reference.got
    closes = [frame for _, frame in talk.peer.taken() if frame.name == "Connection.Close"]
    if talk.peer.transport.is_closing():
        assert [frame.reply_code in HARD_ERRORS for frame in closes] in ([], [True])
        assert closes or isinstance(
            await talk.peer.protocol.closed, (carehare.ConnectionClosedByServer, type(None))
        )
    else:
        assert not closes
    await talk.peer.lost()
    assert all(future.done() for future in (*talk.calls, *talk.told))
    await reference.peer.lost()


@given(mutations, st.integers(1, 100))
async def test_random_damage_to_the_handshake_never_goes_unhandled(
    mutations: list[tuple[str, int, bytes]], piece: int
) -> None:
    data = marshal(START, tune(heartbeat=60), OPEN_OK)
    for how, at, new in mutations:
        data = mutate(data, (how, at % len(data) if data else 0, new))
    peer = Peer(is_open=False)
    for at in range(0, len(data), piece):
        peer.protocol.data_received(data[at : at + piece])
    await peer.lost()
    assert peer.protocol.open.done()


async def test_bug_of_ours_ends_the_connection_and_is_told() -> None:
    def buggy(body: bytes, tag: int, published: int, consumer: ConsumerChannel) -> None:
        raise ZeroDivisionError("a bug")

    peer = Peer()
    peer.consumer(buggy)
    peer.feed(*delivery(1, b"x"), channel=1)
    assert [frame.reply_code for _, frame in peer.taken()] == [541]
    assert isinstance(await peer.protocol.closed, ZeroDivisionError)


# What a broker may say at any time


@pytest.mark.parametrize("make", [Peer.consumer, Peer.publisher, Peer.topology])
async def test_channel_flow_is_answered_and_harms_nobody(make: Callable[[Peer], Any]) -> None:
    peer = Peer()
    channel: CallChannel = make(peer)
    call = channel.call(commands.Queue.Bind(queue="q", exchange="e"))
    peer.taken()
    peer.feed(commands.Channel.Flow(active=False), channel=1)
    peer.feed(commands.Channel.Flow(active=True), channel=1)
    assert [(number, frame.active) for number, frame in peer.taken()] == [(1, False), (1, True)]
    peer.feed(commands.Queue.BindOk(), channel=1)
    assert call.result() is None
    await peer.lost()


async def test_blocked_and_unblocked_are_told() -> None:
    peer = Peer()
    peer.feed(commands.Connection.Blocked("low on memory"), commands.Connection.Unblocked())
    assert peer.blocked == ["low on memory", None]
    assert not peer.transport.is_closing()
    await peer.lost()


async def test_heartbeats_harm_nobody() -> None:
    peer = Peer()
    peer.feed(*[Heartbeat()] * 3)
    assert not peer.transport.is_closing()
    await peer.lost()


# End


async def test_end_by_the_broker_is_answered() -> None:
    talk = Talk()
    talk.peer.feed(close_connection(320, "CONNECTION_FORCED - bye"))
    assert talk.peer.names() == [(0, "Connection.CloseOk")]
    talk.peer.protocol.data_received(Talk.data() + b"garbage that nobody reads")
    exc = await talk.peer.protocol.closed
    assert isinstance(exc, carehare.ConnectionClosedByServer)
    assert (exc.reply_code, exc.reply_text) == (320, "CONNECTION_FORCED - bye")
    assert not talk.got


async def test_nothing_is_read_behind_the_end_in_the_same_read() -> None:
    peer = Peer()
    peer.feed(close_connection(), b"\xff" * 20)
    assert isinstance(await peer.protocol.closed, carehare.ConnectionClosedByServer)


async def test_own_good_bye_is_no_error() -> None:
    peer = Peer()
    peer.protocol.send_close()
    peer.protocol.send_close()
    assert peer.names() == [(0, "Connection.Close")]
    peer.feed(commands.Connection.CloseOk())
    assert await peer.protocol.closed is None
    peer.protocol.send_close()
    assert peer.transport.written == b""


async def test_end_without_a_word_is_an_error() -> None:
    """carehare 1.0.2 takes it for a close of its own."""
    peer = Peer()
    await peer.lost(None)
    reason = peer.protocol.closed.result()
    assert isinstance(reason, carehare.ConnectionClosed)
    assert "RabbitMQ ended the connection" in str(reason)


async def test_lost_network_is_told() -> None:
    peer = Peer()
    await peer.lost(ConnectionResetError(104, "Connection reset by peer"))
    assert isinstance(peer.protocol.closed.result(), ConnectionResetError)


async def test_peer_that_does_not_read_our_last_words_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol_module, "CLOSE_TIMEOUT", 0.01)
    peer = Peer()
    peer.transport.is_read = False
    peer.feed(close_connection())
    assert not peer.transport.is_aborted
    await peer.protocol.closed
    assert peer.transport.is_aborted


async def test_silent_broker_is_left_without_a_word() -> None:
    """AMQP 0-9-1, section 4.2.7: no close handshake with a dead peer."""
    peer = Peer()
    peer.protocol._on_silence()
    assert isinstance(await peer.protocol.closed, carehare.ConnectionClosedByHeartbeatMonitor)
    assert peer.transport.written == b""
    assert peer.transport.is_aborted


async def test_heartbeat_monitors_a_real_connection() -> None:
    """With an interval of a second: the protocol starts it, feeds it, and stops it at the end."""
    peer = Peer("amqp://broker?heartbeat=1", heartbeat=60)
    heartbeat = peer.protocol.heartbeat
    assert heartbeat._tick_length == 0.25
    mark = heartbeat.mark()
    peer.feed(Heartbeat())
    assert heartbeat.mark().beats == mark.beats + 1
    await peer.lost()
    assert heartbeat._timer is None


async def test_cancelled_future_of_the_handshake_does_not_break_the_end() -> None:
    peer = Peer(is_open=False)
    peer.protocol.open.cancel()
    await peer.lost()
    assert isinstance(peer.protocol.closed.result(), carehare.ConnectionClosed)


async def test_channels_are_refused_after_the_end() -> None:
    peer = Peer()
    await peer.lost()
    for make in (peer.topology, peer.consumer, peer.publisher):
        with pytest.raises(carehare.ConnectionClosed):
            make()


async def test_written_frames_of_a_turn_are_one_write() -> None:
    peer = Peer()
    channel = peer.topology()
    writes = peer.transport.writes
    for _ in range(100):
        channel.call(commands.Queue.Bind(queue="q", exchange="e"))
    await asyncio.sleep(0)  # lets the turn end
    assert peer.transport.writes == writes + 1
    assert len(unmarshal(peer.transport.written)) == 100
    await peer.lost()


# An end that asyncio hasn't told yet


async def test_nothing_is_written_in_the_turn_in_which_the_end_was_read() -> None:
    peer = Peer()
    publisher = peer.publisher()
    assert publisher.can_publish()
    peer.protocol.eof_received()
    assert not publisher.can_publish()
    await peer.lost()
