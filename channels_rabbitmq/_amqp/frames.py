"""AMQP 0-9-1 frames as bytes: those of every message by hand, the rest by pamqp.

A frame is a type (1 byte), an AMQP channel number (2), the payload's size (4), the payload and an
end byte (AMQP 0-9-1, section 4.2.3). A method's payload begins with its class (2) and method (2);
here the two are one number, as in pamqp: the method's *index*.

pamqp needs about 12 µs for a delivery, ``struct`` less than one. So what comes with every message
(publish, deliver, ack, nack, content header and body) is written and read here; for all else
``decode`` asks pamqp.

Each value that is read here is checked against the end of its payload, since the bytes behind
belong to the next frame. Only ``find_delivery`` reads the frames behind, and checks all that
``Protocol`` would check: types, AMQP channel, sizes, ends.

pamqp isn't given any table, nor the properties of a message. Over a table that ends amid an array
it loops for ever and takes all memory; over flags that announce more flags it loops for ever.
Nothing of what a broker sends in these is used.

Texts that are for people (why something was closed or blocked) need not be UTF-8: RabbitMQ cuts a
long one between two bytes, also of one character. They are made readable before pamqp sees them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import carehare
import pamqp.commands
import pamqp.frame
import pamqp.header

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME_END = 0xCE
# What a frame takes beyond its payload: 7 bytes before, 1 after.
OVERHEAD = 8
# Bytes: to copy a body that isn't larger costs less than to write it in pieces.
_SMALL_BODY = 1024
# That of all the layer's consumers: each has an AMQP channel of its own.
CONSUMER_TAG = "channels"

# The entry "version" (a long string) in the server's properties; and its first two numbers.
_VERSION_KEY = b"\x07versionS"
_version = re.compile(re.escape(_VERSION_KEY) + rb"\0\0\0.(\d{1,4}\.\d{1,4})", re.DOTALL)

START = 10 << 16 | 10
CONNECTION_CLOSE = 10 << 16 | 50
BLOCKED = 10 << 16 | 60
CHANNEL_CLOSE = 20 << 16 | 40
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
# A header frame up to its properties; and from a header's end up to the body
_header_frame = struct.Struct(">BHIHHQH")
_end_and_frame_head = struct.Struct(">BBHI")
# The header by which a message tells when it was published: its name (RabbitMQ's own message
# interceptors use it) and type, and the milliseconds since 1970. Other readers ignore it.
_PUBLISHED = b"\x0ftimestamp_in_ms" + b"l"
_milliseconds = struct.Struct(">q")
_PUBLISHED_SIZE = len(_PUBLISHED) + _milliseconds.size
# A header frame with a table that holds this and nothing else; and with a correlation-id behind it,
# a short string, up to that string's text
_our_header_frame = struct.Struct(f">BHIHHQHI{len(_PUBLISHED)}sq")
_numbered_header_frame = struct.Struct(f">BHIHHQHI{len(_PUBLISHED)}sqB")
_OUR_HEADER_SIZE = _our_header_frame.size - 7  # bytes of its payload
# The frame of a Basic.Deliver up to its delivery tag: head, index, consumer tag, delivery tag
_deliver_frame = struct.Struct(f">BHII{1 + len(CONSUMER_TAG)}sQ")
_LEAST_DELIVER = _deliver_frame.size - 7  # bytes of its payload
_short_consumer_tag = bytes([len(CONSUMER_TAG)]) + CONSUMER_TAG.encode()
# The flags of two properties: headers (the third of basic's, counted from bit 15), correlation-id
_HAS_HEADERS = 1 << 13
_HAS_CORRELATION_ID = 1 << 10
# Those that come before it: content-type, content-encoding, headers, delivery-mode, priority; and
# the bytes of their length, 0: they are one byte.
_BEFORE_CORRELATION_ID = (
    (1 << 15, 1),
    (1 << 14, 1),
    (_HAS_HEADERS, 4),
    (1 << 12, 0),
    (1 << 11, 0),
)

# Methods with tables: only clients send them, but for connection.start.
_METHODS: dict[int, Any] = pamqp.commands.INDEX_MAPPING
_WITH_TABLES = frozenset(
    index
    for index, method in _METHODS.items()
    if any(method.amqp_type(argument) == "table" for argument in method.__slots__)
)

# Methods with a text for people, and where in the payload that begins, with its length.
_TEXT_AT = {CONNECTION_CLOSE: 6, CHANNEL_CLOSE: 6, BLOCKED: 4}

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
    size: int
    _, _, size, flags = _content_header.unpack_from(data, start)
    if flags & 1:  # "more flags follow": basic has too few properties for that
        raise carehare.BadBytesFromServer("RabbitMQ sent a content header with unknown properties")
    return size


def read_published(data: bytes, start: int, end: int) -> int:
    """Return when a message was published, in milliseconds since 1970, by its content header.

    0 if it doesn't say. (It is searched for: the broker may have added headers of its own.)
    """
    at = data.find(_PUBLISHED, start, end)
    if at < 0 or at + _PUBLISHED_SIZE > end:
        return 0
    published: int = _milliseconds.unpack_from(data, at + len(_PUBLISHED))[0]
    return published


def is_for_our_consumer(data: bytes, start: int) -> bool:
    """Whether a Basic.Deliver has our consumer tag."""
    return data.startswith(_short_consumer_tag, start + 4)


def find_delivery(
    data: bytes, at: int, amqp_channel_id: int, max_payload: int
) -> tuple[int, int, int, int] | None:
    """Return delivery tag, time of publishing (as ``read_published``), start and end of the body.

    That is of a whole delivery which begins at ``at``. None unless that is the frame of a
    Basic.Deliver for our consumer tag, and header and body are one whole frame each, here, in order
    and as agreed: then all are to be read one by one.
    """
    if at + _deliver_frame.size > len(data):
        return None
    frame_type, number, size, index, consumer_tag, tag = _deliver_frame.unpack_from(data, at)
    at += OVERHEAD + size  # of the header's frame
    if (
        index != DELIVER
        or frame_type != METHOD
        or number != amqp_channel_id
        or consumer_tag != _short_consumer_tag
        or not _LEAST_DELIVER <= size <= max_payload
        or at + _header_frame.size > len(data)
        or data[at - 1] != FRAME_END
    ):
        return None
    header_start = at
    frame_type, number, header_size, _, _, size, flags = _header_frame.unpack_from(data, at)
    body_start = at + OVERHEAD + header_size + 7
    body_end = body_start + size
    if (
        frame_type != HEADER
        or number != amqp_channel_id
        or flags & 1
        or not _content_header.size <= header_size <= max_payload
        or not 0 < size <= max_payload
        or body_end >= len(data)
        or data[body_end] != FRAME_END
        or _end_and_frame_head.unpack_from(data, body_start - 8) != (FRAME_END, BODY, number, size)
    ):
        return None
    published = read_published(data, header_start, body_start - 8) if flags & _HAS_HEADERS else 0
    return tag, published, body_start, body_end


def read_correlation_id(data: bytes, start: int, end: int) -> int | None:
    """Return the publish sequence number that we wrote into a message, as the broker returns it.

    The broker may have added properties of its own (RabbitMQ's message interceptors do).
    """
    if end - start < _content_header.size:
        raise _truncated()
    flags = _content_header.unpack_from(data, start)[3]
    if not flags & _HAS_CORRELATION_ID:
        return None
    at = start + _content_header.size
    for flag, length_size in _BEFORE_CORRELATION_ID:
        if flags & flag:
            at = _skip(data, at, end, length_size)
    text_end = _skip(data, at, end, 1)
    text = data[at + 1 : text_end]
    return int(text) if text.isdigit() else None


def _skip(data: bytes, at: int, end: int, length_size: int) -> int:
    """Return where a value ends that begins with its length in so many bytes; 0: it is a byte."""
    length = int.from_bytes(data[at : at + length_size], "big") if length_size else 1
    at += length_size + length
    if at > end:
        raise _truncated()
    return at


def encode_ack(amqp_channel_id: int, tag: int, multiple: bool) -> bytes:
    """Return the frame of a Basic.Ack."""
    return _ack.pack(METHOD, amqp_channel_id, 13, ACK, tag, multiple, FRAME_END)


def encode_publish_method(
    amqp_channel_id: int, exchange: str, routing_key: str, mandatory: bool
) -> bytes:
    """Return the frame of a Basic.Publish, which is the same for all messages to one key."""
    name = exchange.encode()
    key = routing_key.encode()
    payload = b"".join(
        (
            _index.pack(PUBLISH),
            b"\0\0",  # reserved
            bytes([len(name)]),
            name,
            bytes([len(key)]),
            key,
            b"\1" if mandatory else b"\0",
        )
    )
    return _frame_head.pack(METHOD, amqp_channel_id, len(payload)) + payload + b"\xce"


def encode_publish(
    amqp_channel_id: int,
    method: bytes,
    body: bytes,
    published: int,
    sequence_number: int | None,
    max_payload: int,
) -> Sequence[bytes]:
    """Return all frames of one published message: a few pieces, to be written one after the other.

    ``method`` is from ``encode_publish_method``, ``published`` as in ``read_published``. With a
    ``sequence_number`` the message carries that as its correlation-id, by which a Basic.Return is
    told.
    No body frame's payload is longer than ``max_payload`` (frame_max less the 8 bytes around it:
    AMQP 0-9-1, section 4.2.3; an empty body has no frame at all).
    """
    size = len(body)
    # fmt: off
    if sequence_number is None:
        number = b""
        header = _our_header_frame.pack(
            HEADER, amqp_channel_id, _OUR_HEADER_SIZE, 60, 0, size,
            _HAS_HEADERS, _PUBLISHED_SIZE, _PUBLISHED, published,
        )
    else:
        number = b"%d" % sequence_number
        length = len(number)
        header = _numbered_header_frame.pack(
            HEADER, amqp_channel_id, _OUR_HEADER_SIZE + 1 + length, 60, 0, size,
            _HAS_HEADERS | _HAS_CORRELATION_ID, _PUBLISHED_SIZE, _PUBLISHED, published, length,
        )
    # fmt: on
    if 0 < size <= max_payload:
        body_head = _end_and_frame_head.pack(FRAME_END, BODY, amqp_channel_id, size)
        if size <= _SMALL_BODY:
            return (b"".join((method, header, number, body_head, body, b"\xce")),)
        return b"".join((method, header, number, body_head)), body, b"\xce"
    return [method, header, number, b"\xce", *_body_frames(amqp_channel_id, body, max_payload)]


def encode_content(amqp_channel_id: int, body: bytes, max_payload: int) -> bytes:
    """Return the frames of a message's content, without properties."""
    size = len(body)
    header = _header_frame.pack(HEADER, amqp_channel_id, _content_header.size, 60, 0, size, 0)
    return b"".join((header, b"\xce", *_body_frames(amqp_channel_id, body, max_payload)))


def _body_frames(amqp_channel_id: int, body: bytes, max_payload: int) -> Iterator[bytes]:
    for offset in range(0, len(body), max_payload):
        piece = body[offset : offset + max_payload]
        yield _frame_head.pack(BODY, amqp_channel_id, len(piece))
        yield piece
        yield b"\xce"


def encode(frame: Any, amqp_channel_id: int) -> bytes:
    """Return the bytes of a frame of pamqp's."""
    return pamqp.frame.marshal(frame, amqp_channel_id)


def encode_all(methods: Iterable[Any], amqp_channel_id: int) -> bytes:
    """Return the frames of these methods: all, or none if one can't be written."""
    return b"".join(encode(method, amqp_channel_id) for method in methods)


def decode(data: bytes) -> Any:
    """Return pamqp's object for one whole frame; without tables and the properties of messages.

    Raises ``carehare.BadBytesFromServer`` for whatever pamqp makes of damaged bytes (it raises a
    dozen different errors); their text is left out, since it may hold a part of a message.
    """
    frame_type, _, size = read_frame_head(data, 0)
    end = 7 + size
    if frame_type == HEADER:
        return pamqp.header.ContentHeader(body_size=read_body_size(data, 7, end))
    if frame_type == METHOD:
        index = read_index(data, 7, end)
        if index == START:
            data = _without_properties_of_server(data, end)
        elif index in _TEXT_AT:
            data = _with_readable_text(data, 7 + _TEXT_AT[index], end)
        elif index in _WITH_TABLES:
            raise carehare.BadBytesFromServer("RabbitMQ sent a method that only clients send")
    try:
        return pamqp.frame.unmarshal(data)[2]
    except Exception as err:
        raise carehare.BadBytesFromServer(
            f"RabbitMQ sent a frame that can't be read ({type(err).__name__})"
        ) from None


def _with_readable_text(frame: bytes, at: int, end: int) -> bytes:
    """Return the frame with nothing but printable characters in the text at ``at``."""
    text_end = _skip(frame, at, end, 1)
    characters = frame[at + 1 : text_end].decode(errors="surrogateescape")
    text = "".join(c if c.isprintable() else "?" for c in characters).encode()
    payload = frame[7:at] + bytes([len(text)]) + text + frame[text_end:end]
    return frame[:3] + len(payload).to_bytes(4, "big") + payload + frame[end:]


def _without_properties_of_server(start: bytes, end: int) -> bytes:
    """Return the frame of a Connection.Start with the version alone in its table.

    That follows six bytes.
    """
    table_end = _skip(start, 13, end, 4)
    found = _version.search(start, 17, table_end)
    entry = _VERSION_KEY + len(found[1]).to_bytes(4, "big") + found[1] if found else b""
    rest = len(entry).to_bytes(4, "big") + entry + start[table_end:end]
    return _frame_head.pack(METHOD, 0, 6 + len(rest)) + start[7:13] + rest + b"\xce"
