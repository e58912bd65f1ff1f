"""AMQP 0-9-1 frames as bytes: this module handles those of every message, pamqp all others.

A frame is a type (1 byte), an AMQP channel number (2), the payload's size (4), the payload and an
end byte (AMQP 0-9-1, section 4.2.3). A method's payload begins with its class (2) and method (2).
Here, as in pamqp, the two are one number, the method's *index*.

pamqp needs about 12 µs for a delivery, ``struct`` less than one. So this module writes and reads
the frames that every message needs: publish, deliver, ack, nack, content header and body. For all
other frames ``decode`` calls pamqp.

Each function checks the values that it reads against the end of their payload, since the bytes
behind belong to the next frame. Only ``find_delivery`` reads the next frames, too. It checks
everything that ``Protocol`` would check: types, AMQP channel, sizes, ends.

pamqp gets no table, and no properties of a message. A table that ends amid an array makes it loop
for ever and take all memory. Flags that announce more flags make it loop for ever. The layer uses
nothing that a broker sends in tables and properties but what this module reads itself.

Texts for people, which say why something was closed or blocked, need not be UTF-8: RabbitMQ cuts a
long text between two bytes, even within one character. ``decode`` makes them readable before pamqp
sees them.
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
# Bytes of a frame around its payload: 7 before, 1 after.
OVERHEAD = 8
# Bytes. Copying a body up to this size costs less than writing it in pieces.
_SMALL_BODY = 1024
# All consumers of the layer have this tag, since each has an AMQP channel of its own.
CONSUMER_TAG = "channels"

# The entries of the server's properties that are read: the beginning of each, a key and the mark of
# a long string. And a pattern for the rest: a length of one byte, and printable ASCII.
_PROPERTIES = (b"\x07productS", b"\x07versionS", b"\x08platformS", b"\x0ccluster_nameS")
_printable = re.compile(rb"\0\0\0([\x01-\x7f])([ -~]*)")

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
# A header frame up to its properties; the bytes from a header's end up to the body
_header_frame = struct.Struct(">BHIHHQH")
_end_and_frame_head = struct.Struct(">BBHI")
# The header with the time of publishing: its name and type, and the milliseconds since 1970.
# RabbitMQ's own message interceptors use the same name. Other readers ignore it.
_PUBLISHED = b"\x0ftimestamp_in_ms" + b"l"
_milliseconds = struct.Struct(">q")
_PUBLISHED_SIZE = len(_PUBLISHED) + _milliseconds.size
# A header frame whose table holds only this header; the same with a correlation-id, a short string,
# up to that string's text
_our_header_frame = struct.Struct(f">BHIHHQHI{len(_PUBLISHED)}sq")
_numbered_header_frame = struct.Struct(f">BHIHHQHI{len(_PUBLISHED)}sqB")
_OUR_HEADER_SIZE = _our_header_frame.size - 7  # bytes of its payload
_PUBLISHED_AT = _our_header_frame.size - _PUBLISHED_SIZE  # where it is in such a frame
# The frame of a Basic.Deliver up to its delivery tag: head, index, consumer tag, delivery tag
_deliver_frame = struct.Struct(f">BHII{1 + len(CONSUMER_TAG)}sQ")
_LEAST_DELIVER = _deliver_frame.size - 7  # bytes of its payload
_short_consumer_tag = bytes([len(CONSUMER_TAG)]) + CONSUMER_TAG.encode()
# The flags of two properties: headers (the third of basic's, counted from bit 15), correlation-id
_HAS_HEADERS = 1 << 13
_HAS_CORRELATION_ID = 1 << 10
# The properties before correlation-id: content-type, content-encoding, headers, delivery-mode,
# priority. With each flag, the number of bytes of the value's length; 0: the value is one byte.
_BEFORE_CORRELATION_ID = (
    (1 << 15, 1),
    (1 << 14, 1),
    (_HAS_HEADERS, 4),
    (1 << 12, 0),
    (1 << 11, 0),
)

# Methods with tables. Only clients send them, except for connection.start.
_METHODS: dict[int, Any] = pamqp.commands.INDEX_MAPPING
_WITH_TABLES = frozenset(
    index
    for index, method in _METHODS.items()
    if any(method.amqp_type(argument) == "table" for argument in method.__slots__)
)

# Methods with a text for people, and where in the payload its length begins.
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


def read_consumer_tag(data: bytes, start: int, end: int) -> str:
    """Return the consumer tag of a Basic.Deliver, a short string. It is one of ours, so ASCII."""
    tag_end = _skip(data, start + 4, end, 1)
    return data[start + 5 : tag_end].decode(errors="replace")


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

    Returns 0 if the header doesn't say. The entry is searched for, since the broker may have added
    headers of its own. (``find_delivery`` looks at its usual place first.)
    """
    at = data.find(_PUBLISHED, start, end)
    if at < 0 or at + _PUBLISHED_SIZE > end:
        return 0
    published: int = _milliseconds.unpack_from(data, at + len(_PUBLISHED))[0]
    return published


def is_for_our_consumer(data: bytes, start: int) -> bool:
    """Whether the Basic.Deliver at ``start`` has our consumer tag."""
    return data.startswith(_short_consumer_tag, start + 4)


def find_delivery(
    data: bytes, at: int, amqp_channel_id: int, max_payload: int
) -> tuple[int, int, int, int] | None:
    """Return delivery tag, time of publishing, and start and end of the body of a whole delivery.

    The delivery begins at ``at``. The time is as in ``read_published``. Returns None unless the
    first frame is a Basic.Deliver for our consumer tag, and header and body follow at once, each
    complete, in one frame and within the agreed size. Otherwise the caller reads the frames one by
    one.
    """
    if at + _deliver_frame.size > len(data):
        return None
    frame_type, number, size, index, consumer_tag, tag = _deliver_frame.unpack_from(data, at)
    at += OVERHEAD + size  # the start of the header's frame
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
    published_at = at + _PUBLISHED_AT
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
    if not flags & _HAS_HEADERS:
        published = 0
    elif header_size >= _OUR_HEADER_SIZE and data.startswith(_PUBLISHED, published_at):
        published = _milliseconds.unpack_from(data, published_at + len(_PUBLISHED))[0]
    else:
        published = read_published(data, at, body_start - 8)
    return tag, published, body_start, body_end


def read_correlation_id(data: bytes, start: int, end: int) -> int | None:
    """Return the publish sequence number of a returned message; None if it has none.

    The layer wrote it as the correlation-id. The broker may have added other properties: RabbitMQ's
    message interceptors do.
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
    """Return where a value ends. Its length takes ``length_size`` bytes; 0: it is one byte."""
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
    """Return the frame of a Basic.Publish. It is the same for all messages to one key."""
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
    """Return all frames of one published message, as pieces to be written one after the other.

    ``method`` is from ``encode_publish_method``; ``published`` is as in ``read_published``. The
    message carries a ``sequence_number`` as its correlation-id, by which ``read_correlation_id``
    recognises it in a Basic.Return.
    No body frame's payload is longer than ``max_payload``, which is frame_max less the 8 bytes
    around it (AMQP 0-9-1, section 4.2.3). An empty body has no frame.
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
    """Return the bytes of a pamqp frame."""
    return pamqp.frame.marshal(frame, amqp_channel_id)


def encode_all(methods: Iterable[Any], amqp_channel_id: int) -> bytes:
    """Return the frames of all these methods. Raises if one of them can't be written."""
    return b"".join(encode(method, amqp_channel_id) for method in methods)


def decode(data: bytes) -> Any:
    """Return pamqp's object for one whole frame, without tables and properties of messages.

    Raises ``carehare.BadBytesFromServer`` for damaged bytes, for which pamqp has a dozen different
    errors. Their text is left out, since it may hold a part of a message.
    """
    frame_type, _, size = read_frame_head(data, 0)
    end = 7 + size
    if frame_type == HEADER:
        return pamqp.header.ContentHeader(body_size=read_body_size(data, 7, end))
    if frame_type == METHOD:
        index = read_index(data, 7, end)
        if index == START:
            data = _with_few_properties_of_server(data, end)
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
    """Return the frame with only printable characters in the text at ``at``."""
    text_end = _skip(frame, at, end, 1)
    characters = frame[at + 1 : text_end].decode(errors="surrogateescape")
    text = "".join(c if c.isprintable() else "?" for c in characters).encode()
    payload = frame[7:at] + bytes([len(text)]) + text + frame[text_end:end]
    return frame[:3] + len(payload).to_bytes(4, "big") + payload + frame[end:]


def _with_few_properties_of_server(start: bytes, end: int) -> bytes:
    """Return the frame of a Connection.Start whose table holds only what is of use.

    The table comes after the first six bytes of the payload.
    """
    table_end = _skip(start, 13, end, 4)
    entries = b"".join(_find_property(key, start, 17, table_end) for key in _PROPERTIES)
    rest = len(entries).to_bytes(4, "big") + entries + start[table_end:end]
    return _frame_head.pack(METHOD, 0, 6 + len(rest)) + start[7:13] + rest + b"\xce"


def _find_property(key: bytes, data: bytes, at: int, end: int) -> bytes:
    """Return the entry that begins with ``key``; nothing if it isn't a short, readable text."""
    found = data.find(key, at, end)
    text = _printable.match(data, found + len(key), end) if found >= 0 else None
    if text is None or len(text[2]) < text[1][0]:
        return b""
    return key + b"\0\0\0" + text[1] + text[2][: text[1][0]]
