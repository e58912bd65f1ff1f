"""AMQP 0-9-1 frames as bytes: those of every message by hand, the rest by pamqp.

A frame is a type (1 byte), an AMQP channel number (2), the payload's size (4), the payload and an
end byte (AMQP 0-9-1, section 4.2.3). A method's payload begins with its class (2) and method (2);
here the two are one number, as in pamqp: the method's *index*.

pamqp needs about 12 µs for a delivery, ``struct`` less than one. So what comes with every message
(publish, deliver, ack, nack, content header and body) is written and read here; for all else
``decode`` asks pamqp.

What is read here is checked against the end of its payload: the bytes behind that belong to the
next frame.
"""

from __future__ import annotations

import struct
from typing import Any

import carehare
import pamqp.frame

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME_END = 0xCE
# What a frame takes beyond its payload: 7 bytes before, 1 after.
OVERHEAD = 8

PUBLISH = 60 << 16 | 40
RETURN = 60 << 16 | 50
DELIVER = 60 << 16 | 60
ACK = 60 << 16 | 80
NACK = 60 << 16 | 120

_frame_head = struct.Struct(">BHI")
_index = struct.Struct(">I")
_tag_and_bits = struct.Struct(">QB")
_tag = struct.Struct(">Q")
_ack = struct.Struct(">BHIIQBB")
# class (basic), weight, size of the body, flags that tell which properties follow
_content_header = struct.Struct(">HHQH")
# Where, in a frame with a content header, the second byte of those flags is.
_LAST_FLAGS_BYTE = 7 + _content_header.size - 1
# The flag of the property correlation-id (the sixth of basic's, counted from bit 15).
_HAS_CORRELATION_ID = 1 << 10

read_frame_head = _frame_head.unpack_from


def max_payload(frame_max: int) -> int:
    """Return how many bytes of a body one frame holds; ``frame_max`` 0 means no limit."""
    return frame_max - OVERHEAD if frame_max else 128 * 1024


def _truncated() -> carehare.BadBytesFromServer:
    return carehare.BadBytesFromServer("RabbitMQ sent a frame that ends too early")


def read_index(data: bytes, start: int, end: int) -> int:
    """Return the index of the method whose payload is ``data[start:end]``."""
    if end - start < 4:
        raise _truncated()
    index: int = _index.unpack_from(data, start)[0]
    return index


def read_delivery_tag(data: bytes, start: int, end: int) -> int:
    """Return the delivery tag of a Basic.Deliver; it follows the consumer tag, a short string."""
    at = start + 5 + data[start + 4]
    if at + 8 > end:
        raise _truncated()
    tag: int = _tag.unpack_from(data, at)[0]
    return tag


def read_confirm(data: bytes, start: int, end: int) -> tuple[int, bool]:
    """Return (delivery tag, multiple) of a Basic.Ack or Basic.Nack."""
    if end - start < 13:
        raise _truncated()
    tag, bits = _tag_and_bits.unpack_from(data, start + 4)
    return tag, bool(bits & 1)


def read_body_size(data: bytes, start: int, end: int) -> int:
    """Return the size of the body that a content header announces."""
    if end - start < _content_header.size:
        raise _truncated()
    size: int = _content_header.unpack_from(data, start)[2]
    return size


def read_correlation_id(data: bytes, start: int, end: int) -> int | None:
    """Return the publish sequence number that we wrote into a message, as the broker returns it.

    The broker may have added properties of its own (RabbitMQ's message interceptors do).
    """
    if end - start < _content_header.size:
        raise _truncated()
    flags = _content_header.unpack_from(data, start)[3]
    if flags == _HAS_CORRELATION_ID:
        at = start + _content_header.size
        text_end = at + 1 + data[at]
        if text_end > end:
            raise _truncated()
        text = data[at + 1 : text_end]
    else:
        header = decode(_frame_head.pack(HEADER, 0, end - start) + data[start : end + 1])
        text = (header.properties.correlation_id or "").encode()
    return int(text) if text.isdigit() else None


def encode_ack(amqp_channel_id: int, tag: int, multiple: bool) -> bytes:
    """Return the frame of a Basic.Ack."""
    return _ack.pack(METHOD, amqp_channel_id, 13, ACK, tag, multiple, FRAME_END)


def encode_publish_start(exchange: str) -> bytes:
    """Return what all Basic.Publish payloads to one exchange begin with."""
    name = exchange.encode()
    return _index.pack(PUBLISH) + b"\0\0" + bytes([len(name)]) + name


def encode_publish(
    amqp_channel_id: int,
    start: bytes,
    routing_key: str,
    body: bytes,
    *,
    sequence_number: int | None,
    max_payload: int,
) -> bytes:
    """Return all frames of one published message.

    ``start`` is from ``encode_publish_start``. With a ``sequence_number`` the message is
    *mandatory* and carries the number as its correlation-id, by which a Basic.Return is told.
    No body frame's payload is longer than ``max_payload`` (frame_max less the 8 bytes around it:
    AMQP 0-9-1, section 4.2.3; an empty body has no frame at all).
    """
    key = routing_key.encode()
    method_size = len(start) + len(key) + 2
    if sequence_number is None:
        mandatory, flags, properties = b"\0", 0, b""
    else:
        text = b"%d" % sequence_number
        mandatory, flags, properties = b"\1", _HAS_CORRELATION_ID, bytes([len(text)]) + text
    size = len(body)
    parts = [
        _frame_head.pack(METHOD, amqp_channel_id, method_size),
        start,
        bytes([len(key)]),
        key,
        mandatory,
        b"\xce",
        _frame_head.pack(HEADER, amqp_channel_id, _content_header.size + len(properties)),
        _content_header.pack(60, 0, size, flags),
        properties,
        b"\xce",
    ]
    for offset in range(0, size, max_payload):
        piece = body if size <= max_payload else body[offset : offset + max_payload]
        parts += (_frame_head.pack(BODY, amqp_channel_id, len(piece)), piece, b"\xce")
    return b"".join(parts)


def encode(frame: Any, amqp_channel_id: int) -> bytes:
    """Return the bytes of a frame of pamqp's."""
    return pamqp.frame.marshal(frame, amqp_channel_id)


def decode(data: bytes) -> Any:
    """Return pamqp's object for one whole frame.

    Raises ``carehare.BadBytesFromServer`` for whatever pamqp makes of damaged bytes (it raises a
    dozen different errors); their text is left out, since it may hold a part of a message.
    """
    # "More flags follow": basic has too few properties for that, and pamqp would never come back.
    if data[0] == HEADER and len(data) > _LAST_FLAGS_BYTE and data[_LAST_FLAGS_BYTE] & 1:
        raise carehare.BadBytesFromServer("RabbitMQ sent a content header with unknown properties")
    try:
        return pamqp.frame.unmarshal(data)[2]
    except Exception as err:
        raise carehare.BadBytesFromServer(
            f"RabbitMQ sent a frame that can't be read ({type(err).__name__})"
        ) from None
