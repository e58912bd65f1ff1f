"""Texts that others have chosen (the system, the broker) stop nothing, whatever they hold."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import quote

import carehare
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import commands

from channels_rabbitmq._amqp import frames
from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._broker.reasons import describe
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.amqp_peer import Peer, marshal
from tests.support.brokers import Broker
from tests.support.log_lines import log_lines

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

# A Latin-1 é as Python has it if the system's names are UTF-8; no encoding at all; very long
HOST_NAMES = ["caf\udce9", "\ud800", "bücher", "x" * 5000]


@pytest.mark.parametrize("name", HOST_NAMES, ids=["latin-1", "surrogate", "umlaut", "long"])
async def test_the_name_of_the_host(
    open_layer: OpenLayer, broker: Broker, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    layer = await open_layer()
    with log_lines(logging.WARNING) as lines:
        channel = await layer.new_channel()
        await layer.send(channel, {"type": "t"})
        assert await layer.receive(channel) == {"type": "t"}
        assert not lines.rest()
    if broker.private is not None:
        rows = await asyncio.to_thread(broker.private.list_connections)
        id_ = channel.partition("!")[0]
        names = [str(row["client_properties"].get("connection_name")) for row in rows]
        shown = {"caf\udce9": "caf\\udce9", "\ud800": "\\ud800"}.get(name, name[:255])
        assert len([one for one in names if f"{id_} ({shown}, pid " in one]) == 2


def close_frame(kind: str, text: bytes) -> bytes:
    """Return the frame by which a broker closes or blocks, with a text of any bytes."""
    index, before, behind = {
        "connection": (frames.CONNECTION_CLOSE, b"\x01\x93", b"\0\x0a\0\x28"),
        "channel": (frames.CHANNEL_CLOSE, b"\x01\x93", b"\0\x0a\0\x28"),
        "blocked": (frames.BLOCKED, b"", b""),
    }[kind]
    payload = index.to_bytes(4, "big") + before + bytes([len(text)]) + text + behind
    number = b"\0\1" if kind == "channel" else b"\0\0"
    return b"\x01" + number + len(payload).to_bytes(4, "big") + payload + b"\xce"


@pytest.mark.parametrize("kind", ["connection", "channel", "blocked"])
@given(st.binary(max_size=255))
@example("é".encode() * 127 + b"\xc3")  # cut amid a character
@example(b"\xff" * 255)
@example(b"two\nlines \x1b[31m")
def test_the_brokers_texts(kind: str, text: bytes) -> None:
    frame = frames.decode(close_frame(kind, text))
    told = frame.reason if kind == "blocked" else frame.reply_text
    assert told == "" or told.isprintable()
    if kind != "blocked":
        assert (frame.reply_code, frame.class_id, frame.method_id) == (403, 10, 40)
    try:
        plain = text.decode()
    except UnicodeDecodeError:
        assert "?" in told
    else:
        assert told == plain or not plain.isprintable()


@given(st.integers(0, 255), st.binary(max_size=20))
def test_a_text_that_is_longer_than_its_frame(length: int, text: bytes) -> None:
    frame = bytearray(close_frame("connection", text))
    frame[13] = length  # of the text
    try:
        frames.decode(bytes(frame))
    except carehare.BadBytesFromServer:
        assert length != len(text)


async def test_a_refusal_that_is_not_utf_8() -> None:
    peer = Peer(is_open=False)
    peer.feed(close_frame("connection", b"ACCESS_REFUSED - user caf\xe9"))
    with pytest.raises(carehare.ConnectionClosedByServer) as caught:
        await peer.protocol.open
    assert str(caught.value).endswith("403 ACCESS_REFUSED - user caf?")


async def test_an_alarm_that_is_not_utf_8() -> None:
    peer = Peer()
    peer.feed(close_frame("blocked", b"low on m\xe9moire"))
    peer.feed(marshal(commands.Connection.Unblocked()))
    assert peer.blocked == ["low on m?moire", None]


async def test_a_virtual_host_whose_name_the_broker_cuts(broker: Broker) -> None:
    """The text of its refusal has 255 bytes at most, the last of which may be half a character."""
    for before in ("", "x"):
        name = before + "é" * 126
        url = BrokerUrl.parse(f"{broker.url.rstrip('/')}/{quote(name)}")
        # RabbitMQ 4.0 to 4.3 end the connection without a word.
        with pytest.raises(
            (carehare.ConnectionClosedByServer, carehare.ConnectionClosed),
            match=f"530 NOT_ALLOWED - vhost {before}ééé|ended the connection during the login",
        ):
            await Connection(url).connect(asyncio.get_running_loop().time() + 10)


@pytest.mark.parametrize("part", ["user", "password"])
async def test_credentials_that_are_too_long_for_the_broker(broker: Broker, part: str) -> None:
    """As tokens are: up to 4.0 it takes 4096 bytes in the handshake, and says nothing beyond."""
    user, password = ("x" * 9000, "guest") if part == "user" else ("guest", "x" * 9000)
    address = broker.url.rpartition("@")[2]
    url = BrokerUrl.parse(f"amqp://{user}:{password}@{address}")
    with pytest.raises(carehare.ConnectionClosed, match=r"during the login: .* may be too long"):
        await Connection(url).connect(asyncio.get_running_loop().time() + 10)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("caf\udce9", "caf?"),
        ("a\x1b[31m\x00b", "a?[31m?b"),
        ("bücher", "bücher"),
        ("x" * 5000, "x" * 1000),
    ],
    ids=["surrogate", "control", "umlaut", "long"],
)
def test_any_error_in_one_line(text: str, told: str) -> None:
    assert describe(OSError(text)) == told
