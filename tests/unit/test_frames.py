"""Frames by hand are those of pamqp, byte for byte; damaged ones give one kind of error."""

from __future__ import annotations

import contextlib

import carehare
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from channels_rabbitmq._amqp import frames
from tests.support.amqp_peer import marshal, plain, unmarshal

channel_numbers = st.integers(1, 65535)
tags = st.integers(0, 2**63 - 1)  # pamqp takes them as signed
# What pamqp takes as the name of an exchange.
exchanges = st.text("abcXYZ019-_.:@#,/ ", max_size=127)


def short_strings(longest: int = 255) -> st.SearchStrategy[str]:
    characters = st.characters(exclude_categories=["Cs"])
    return st.text(characters, max_size=longest).filter(lambda text: len(text.encode()) <= longest)


def payload(frame: bytes, before: bytes = b"", behind: bytes = b"") -> tuple[bytes, int, int]:
    """Return the arguments for reading a frame's payload amid other bytes."""
    start = len(before) + 7
    return before + frame + behind, start, start + len(frame) - frames.OVERHEAD


neighbours = st.binary(max_size=40)


# Writing


@given(channel_numbers, tags, st.booleans())
def test_ack_is_pamqps(channel: int, tag: int, multiple: bool) -> None:
    assert frames.encode_ack(channel, tag, multiple) == marshal(
        commands.Basic.Ack(tag, multiple), channel=channel
    )


def pamqps_publish(
    channel: int,
    exchange: str,
    key: str,
    body: bytes,
    published: int,
    sequence_number: int | None,
    max_payload: int,
) -> bytes:
    headers = {"timestamp_in_ms": published}
    if sequence_number is None:
        properties = commands.Basic.Properties(headers=headers)
    else:
        properties = commands.Basic.Properties(headers=headers, correlation_id=str(sequence_number))
    return marshal(
        commands.Basic.Publish(0, exchange, key, mandatory=sequence_number is not None),
        ContentHeader(body_size=len(body), properties=properties),
        *(ContentBody(body[at : at + max_payload]) for at in range(0, len(body), max_payload)),
        channel=channel,
    )


@given(
    channel=channel_numbers,
    exchange=exchanges,
    key=short_strings(),
    published=st.integers(2**40, 2**62),  # pamqp writes smaller numbers in less
    sequence_number=st.none() | st.integers(1, 2**63),
    max_payload=st.integers(1, 300) | st.just(3000),
    data=st.data(),
)
def test_publish_is_pamqps(
    channel: int,
    exchange: str,
    key: str,
    published: int,
    sequence_number: int | None,
    max_payload: int,
    data: st.DataObject,
) -> None:
    """Whatever the size of the body: above all around the multiples of what a frame holds."""
    near = st.builds(
        lambda n, more: max(0, n * max_payload + more), st.integers(0, 4), st.integers(-2, 2)
    )
    size = data.draw(near | st.integers(0, 2000), label="size")
    body = bytes(n % 251 for n in range(size))
    encoded = frames.encode_publish(
        channel,
        frames.encode_publish_method(channel, exchange, key, sequence_number is not None),
        body,
        published=published,
        sequence_number=sequence_number,
        max_payload=max_payload,
    )
    assert b"".join(encoded) == pamqps_publish(
        channel, exchange, key, body, published, sequence_number, max_payload
    )


@pytest.mark.parametrize("frame_max", [4096, 8192, 131072, 0])
@pytest.mark.parametrize("more", [-9, -8, -7, -1, 0, 1, 7, 8])
def test_no_frame_is_larger_than_frame_max(frame_max: int, more: int) -> None:
    """carehare 1.0.2 leaves no room for the 8 bytes around a body."""
    limit = frame_max or 128 * 1024 + 8
    body = b"x" * (3 * limit + more)
    encoded = frames.encode_publish(
        1,
        frames.encode_publish_method(1, "e", "key", True),
        body,
        published=1,
        sequence_number=7,
        max_payload=frames.max_payload(frame_max),
    )
    written = [frame for _, frame in unmarshal(b"".join(encoded))]
    assert all(len(marshal(frame)) <= limit for frame in written)
    assert b"".join(frame.value for frame in written[2:]) == body


def test_empty_body_has_no_body_frame() -> None:
    method = frames.encode_publish_method(1, "e", "key", False)
    encoded = frames.encode_publish(
        1, method, b"", published=1, sequence_number=None, max_payload=100
    )
    assert [plain(frame)[0] for _, frame in unmarshal(b"".join(encoded))] == [
        "Basic.Publish",
        "header",
    ]


@pytest.mark.parametrize("name", ["x" * 256, "ä" * 128, "\ud800"])
def test_name_that_no_frame_can_hold(name: str) -> None:
    with pytest.raises(ValueError, match=r"range|surrogates"):
        frames.encode_publish_method(1, name, "key", False)
    with pytest.raises(ValueError, match=r"range|surrogates"):
        frames.encode_publish_method(1, "exchange", name, False)


# Reading


@given(
    channel=channel_numbers,
    tag=tags,
    consumer_tag=short_strings(),
    redelivered=st.booleans(),
    exchange=exchanges,
    key=short_strings(),
    before=neighbours,
    behind=neighbours,
)
def test_delivery_tag_is_what_pamqp_reads(
    channel: int,
    tag: int,
    consumer_tag: str,
    redelivered: bool,
    exchange: str,
    key: str,
    before: bytes,
    behind: bytes,
) -> None:
    frame = marshal(
        commands.Basic.Deliver(consumer_tag, tag, redelivered, exchange, key), channel=channel
    )
    where = payload(frame, before, behind)
    assert frames.read_frame_head(where[0], len(before)) == (1, channel, len(frame) - 8)
    assert frames.read_index(*where) == frames.DELIVER
    assert frames.read_delivery_tag(*where) == tag


@given(tags, st.booleans(), st.booleans(), neighbours, neighbours)
def test_confirm_is_what_pamqp_reads(
    tag: int, multiple: bool, requeue: bool, before: bytes, behind: bytes
) -> None:
    ack = payload(marshal(commands.Basic.Ack(tag, multiple)), before, behind)
    nack = payload(marshal(commands.Basic.Nack(tag, multiple, requeue)), before, behind)
    assert frames.read_index(*ack) == frames.ACK
    assert frames.read_index(*nack) == frames.NACK
    assert frames.read_confirm(*ack) == frames.read_confirm(*nack) == (tag, multiple)


properties = st.fixed_dictionaries(
    {},
    optional={
        "content_type": short_strings(20),
        "content_encoding": short_strings(20),
        "priority": st.integers(0, 255),
        "headers": st.dictionaries(short_strings(20), st.integers(0, 100), max_size=3),
        "delivery_mode": st.integers(1, 2),
        "correlation_id": st.integers(0, 2**64).map(str) | short_strings(40),
        "reply_to": short_strings(20),
        "expiration": st.integers(0, 1000).map(str),
        "message_id": short_strings(20),
        "app_id": short_strings(20),
    },
)


@given(size=st.integers(0, 2**64 - 1), properties=properties, before=neighbours, behind=neighbours)
@example(size=0, properties={"correlation_id": "1"}, before=b"", behind=b"")
@example(size=0, properties={"correlation_id": "²"}, before=b"", behind=b"")
@example(size=0, properties={"correlation_id": "12", "headers": {"x": 1}}, before=b"", behind=b"\0")
def test_content_header_is_what_pamqp_reads(
    size: int, properties: dict[str, object], before: bytes, behind: bytes
) -> None:
    """Also when the broker has added properties to ours, as its message interceptors do."""
    frame = marshal(
        ContentHeader(body_size=size, properties=commands.Basic.Properties(**properties))
    )
    where = payload(frame, before, behind)
    assert frames.read_body_size(*where) == size
    text = unmarshal(frame)[0][1].properties.correlation_id or ""
    is_number = text.isascii() and text.isdigit()
    assert frames.read_correlation_id(*where) == (int(text) if is_number else None)


@pytest.mark.parametrize("headers", [{}, {"a": 1, "timestamp": 7}, {"x-death": "y" * 50}])
@pytest.mark.parametrize("sequence_number", [None, "12"])
def test_time_of_publishing_is_found_whatever_else_was_added(
    headers: dict[str, object], sequence_number: str | None
) -> None:
    published = 1_764_000_000_123
    for added in (headers, {"content": "type", **headers}):
        properties = commands.Basic.Properties(
            content_type="text/plain" if added else None,
            headers={**added, "timestamp_in_ms": published, "z": 3},
            correlation_id=sequence_number,
        )
        frame = marshal(ContentHeader(body_size=7, properties=properties))
        assert frames.read_published(*payload(frame, b"before", b"behind")) == published
        without = commands.Basic.Properties(headers=added, correlation_id=sequence_number)
        frame = marshal(ContentHeader(body_size=7, properties=without))
        assert frames.read_published(*payload(frame)) == 0


def methods_of_each_message() -> list[tuple[object, object]]:
    header = ContentHeader(
        body_size=7, properties=commands.Basic.Properties(correlation_id="1" * 20)
    )
    with_others = ContentHeader(
        body_size=7,
        properties=commands.Basic.Properties(
            content_type="text/plain",
            content_encoding="x",
            headers={"a": "b"},
            delivery_mode=1,
            priority=3,
            correlation_id="123",
        ),
    )
    return [
        (frames.read_index, commands.Basic.Ack(1)),
        (frames.read_delivery_tag, commands.Basic.Deliver("channels", 1, False, "", "")),
        (frames.read_confirm, commands.Basic.Ack(1, True)),
        (frames.read_confirm, commands.Basic.Nack(1, True)),
        (frames.read_body_size, header),
        (frames.read_correlation_id, header),
        (frames.read_correlation_id, with_others),
    ]


@pytest.mark.parametrize(("read", "frame"), methods_of_each_message())
@pytest.mark.parametrize("is_first", [True, False])
def test_truncated_payload_is_not_read_on_into_the_next_frame(
    read: object, frame: object, is_first: bool
) -> None:
    assert callable(read)
    whole = marshal(frame)
    complete = read(*payload(whole))
    next_frame = b"" if is_first else marshal(commands.Basic.Ack(2**62, True))
    shortest = 4 if read in (frames.read_delivery_tag, frames.read_confirm) else 0
    results = []
    for size in range(shortest, len(whole) - 8):
        cut = whole[:3] + size.to_bytes(4, "big") + whole[7 : 7 + size] + b"\xce"
        # It may be shorter than needed for what is asked, but must not give anything else.
        with contextlib.suppress(carehare.BadBytesFromServer):
            results.append(read(*payload(cut, behind=next_frame)))
    assert set(results) <= {complete}
    assert len(results) < len(whole) - 8 - shortest


def test_time_of_publishing_is_not_read_on_into_the_next_frame() -> None:
    properties = commands.Basic.Properties(headers={"timestamp_in_ms": 2**50})
    whole = marshal(ContentHeader(body_size=7, properties=properties))
    for end in range(7, len(whole) - 1):
        assert frames.read_published(whole, 7, end) == 0
    assert frames.read_published(whole, 7, len(whole) - 1) == 2**50


def whole_delivery(header: bytes, body: bytes) -> bytes:
    deliver = commands.Basic.Deliver(frames.CONSUMER_TAG, 7, False, "groups", "key")
    return marshal(deliver) + header + marshal(ContentBody(body))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (None, 0),
        ({}, 0),
        ({"a": 1}, 0),
        ({"timestamp_in_ms": 2**50}, 2**50),
        ({"timestamp_in_ms": 2**50, "z": 3}, 2**50),
        ({"a": 1, "timestamp_in_ms": 2**50}, 2**50),
    ],
)
@pytest.mark.parametrize("content_type", [None, "text/plain"])
def test_delivery_tells_when_it_was_published(
    headers: dict[str, object] | None, expected: int, content_type: str | None
) -> None:
    properties = commands.Basic.Properties(content_type=content_type, headers=headers)
    header = marshal(ContentHeader(body_size=4, properties=properties))
    data = whole_delivery(header, b"body")
    found = frames.find_delivery(data, 0, 0, 1000)
    assert found is not None
    tag, published, start, end = found
    assert (tag, published, data[start:end]) == (7, expected, b"body")


def test_delivery_is_not_read_on_for_its_time_of_publishing() -> None:
    properties = commands.Basic.Properties(headers={"timestamp_in_ms": 2**50})
    whole = marshal(ContentHeader(body_size=40, properties=properties))
    for missing in range(1, 9):
        size = len(whole) - frames.OVERHEAD - missing
        cut = whole[:3] + size.to_bytes(4, "big") + whole[7 : 7 + size] + b"\xce"
        found = frames.find_delivery(whole_delivery(cut, b"x" * 40), 0, 0, 1000)
        assert found is not None
        assert found[1] == 0


# pamqp's part


@pytest.mark.parametrize(
    "frame",
    [
        Heartbeat(),
        commands.Queue.DeclareOk("q", 1, 2),
        commands.Connection.Close(320, "bye", 0, 0),
        ContentBody(b"body"),
        ContentHeader(body_size=3),
        commands.Connection.Start(mechanisms="PLAIN", locales="en_US"),
    ],
)
def test_the_rest_goes_through_pamqp(frame: object) -> None:
    channel = 0 if isinstance(frame, Heartbeat) else 3
    assert frames.encode(frame, channel) == marshal(frame, channel=channel)
    assert plain(frames.decode(marshal(frame, channel=channel))) == plain(frame)


@pytest.mark.parametrize(
    ("version", "read"),
    [
        ("4.3.6", {"version": "4.3.6"}),
        ("3.10.8-1", {"version": "3.10.8-1"}),
        (4, {}),
        ("", {}),
        ("4\n5", {}),
        ("4ß", {}),
        ("4" * 127, {"version": "4" * 127}),
        ("4" * 128, {}),
    ],
)
def test_of_the_properties_of_a_server_some_are_read(version: object, read: dict[str, str]) -> None:
    """Texts that are short and readable, and what is before and behind them is not damaged."""
    others = {"product": "R", "platform": "Erlang 1", "cluster_name": "c@host"}
    properties = {"capabilities": {"a": True}, "version": version, **others, "x": "product"}
    start = commands.Connection.Start(mechanisms="PLAIN", server_properties=properties)
    decoded = frames.decode(marshal(start, channel=0))
    assert isinstance(decoded, commands.Connection.Start)
    assert (decoded.server_properties, decoded.mechanisms) == (others | read, "PLAIN")


@given(
    st.sampled_from([1, 2, 3, 8, 5, 65]),
    channel_numbers,
    st.binary(max_size=60)
    | st.builds(
        lambda index, rest: index.to_bytes(4, "big") + rest,
        st.sampled_from(sorted(commands.INDEX_MAPPING)),
        st.binary(max_size=60),
    ),
)
def test_damaged_bytes_give_one_kind_of_error(
    frame_type: int, channel: int, payload: bytes
) -> None:
    head = frame_type.to_bytes(1, "big") + channel.to_bytes(2, "big")
    data = head + len(payload).to_bytes(4, "big") + payload + b"\xce"
    with contextlib.suppress(carehare.BadBytesFromServer):
        frames.decode(data)


def test_a_content_header_that_announces_more_flags_is_refused_not_read_for_ever() -> None:
    header = bytearray(marshal(ContentHeader(body_size=3)))
    header[-2] |= 1
    with pytest.raises(carehare.BadBytesFromServer, match="unknown properties"):
        frames.decode(bytes(header))


ENDLESS_ARRAY = b"\x01aA\x7f\xff\xff\xff"  # the field "a": an array of 2 GiB


def test_table_that_ends_amid_an_array_is_not_read_for_ever() -> None:
    """pamqp would fill all memory. It's given none: that of connection.start is left out."""
    table = len(ENDLESS_ARRAY).to_bytes(4, "big") + ENDLESS_ARRAY
    payload = b"\0\x0a\0\x0a\0\x09" + table + b"\0\0\0\x05PLAIN" + b"\0\0\0\x05en_US"
    start = frames.decode(b"\x01\0\0" + len(payload).to_bytes(4, "big") + payload + b"\xce")
    assert (start.mechanisms, start.locales, start.server_properties) == ("PLAIN", "en_US", {})

    whole = marshal(commands.Queue.Declare(queue="q", arguments={"x": 1}))
    with pytest.raises(carehare.BadBytesFromServer, match="only clients"):
        frames.decode(whole)


def test_properties_that_end_amid_an_array_are_not_read_for_ever() -> None:
    size = len(ENDLESS_ARRAY).to_bytes(4, "big")
    payload = b"\0\x3c\0\0" + (7).to_bytes(8, "big") + b"\x24\0" + size + ENDLESS_ARRAY + b"\x0212"
    header = b"\x02\0\x01" + len(payload).to_bytes(4, "big") + payload + b"\xce"
    assert frames.decode(header).body_size == 7
    assert frames.read_correlation_id(header, 7, len(header) - 1) == 12


def test_error_about_damaged_bytes_holds_none_of_them() -> None:
    data = marshal(commands.Queue.DeclareOk("a secret name", 0, 0))
    damaged = data[:14] + b"\xff" + data[15:]
    with pytest.raises(carehare.BadBytesFromServer) as caught:
        frames.decode(damaged)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
