"""Texts of a broker that aren't what they should be, with a peer that tests play."""

from __future__ import annotations

import carehare
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import commands

from channels_rabbitmq._amqp import frames
from channels_rabbitmq._broker.reasons import describe
from tests.support.amqp_peer import Peer, marshal


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
