"""MessageCodec: strict to senders, total for whatever bytes come."""

from __future__ import annotations

import base64
import copy
import enum
import gc
import hashlib
import math
import os
import re
import struct
import sys
import tracemalloc
from collections import Counter, OrderedDict, namedtuple
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import msgpack
import pytest
from channels.exceptions import MessageTooLarge
from cryptography.fernet import Fernet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from channels_rabbitmq._codec import Envelope, MalformedBody, MessageCodec
from tests.support.codecs import codec, encoding_error, same, secret_codec, there_and_back


def malformed(body: bytes, by: MessageCodec = codec) -> str:
    """The text of the MalformedBody."""
    with pytest.raises(MalformedBody) as caught:
        by.decode(body)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return str(caught.value)


# The wire format


def test_the_body_is_the_message_and_its_group() -> None:
    body = codec.encode_for_group("chat", {"type": "x", "n": [1, {"b": b"\0"}]})
    assert msgpack.unpackb(body) == {
        "type": "x",
        "n": [1, {"b": b"\0"}],
        "__asgi_group__": "chat",
    }


def test_the_body_is_the_message_and_its_channel() -> None:
    body = codec.encode_for_channel("crq.abc!x", {"type": "x"})
    assert msgpack.unpackb(body) == {"type": "x", "__asgi_channel__": "crq.abc!x"}


def test_a_body_of_another_program() -> None:
    """kombu's and pika's users write the map by hand, in any order."""
    body = msgpack.packb({"__asgi_group__": "chat", "type": "x", "when": 1.5})
    envelope = codec.decode(body)
    assert (envelope.group, envelope.channel) == ("chat", None)
    assert envelope.size == len(body)
    assert envelope.message() == {"type": "x", "when": 1.5}


@pytest.mark.parametrize("recipient", [{"__asgi_channel__": "a!b"}, {"__asgi_group__": "g"}])
def test_other_keys_than_strings_are_accepted_from_others(recipient: dict[str, str]) -> None:
    message = {"type": "x", 5: 1, b"k": 2, "deep": {1: {None: 3}}}
    envelope = codec.decode(msgpack.packb({**message, **recipient}))
    assert envelope.message() == message
    assert envelope.message() == message


def test_encoding_leaves_the_message_as_it_was() -> None:
    message = {"type": "x", "list": [1, (2, 3)]}
    before = copy.deepcopy(message)
    codec.encode_for_group("g", message)
    secret_codec.encode_for_channel("a!b", message)
    assert message == before


# Round trips

atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(),
    st.binary(),
)
allowed = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(), inner, max_size=4),
    ),
)
messages = st.dictionaries(
    st.text().filter(lambda key: not key.startswith("__asgi_")), allowed, max_size=5
)


def as_received(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [as_received(item) for item in value]
    if isinstance(value, dict):
        return {key: as_received(item) for key, item in value.items()}
    if isinstance(value, bytearray):
        return bytes(value)
    return value


@settings(deadline=None)
@given(message=messages, group=st.text(min_size=1))
def test_round_trip_of_every_allowed_type(message: dict[str, Any], group: str) -> None:
    for by in (codec, secret_codec):
        body = by.encode_for_group(group, message)
        envelope = by.decode(body)
        assert (envelope.group, envelope.channel) == (group, None)
        assert envelope.size == len(body)
        assert same(envelope.message(), as_received(message))
        assert same(envelope.message(), as_received(message))


@pytest.mark.parametrize(
    "value",
    [
        -(2**63), 2**63 - 1, 0, -1, 0.0, -0.0, 1e308, 5e-324, math.inf, -math.inf, math.nan,
        "", "\0", "\U0010ffff", 70000 * "ä", b"", bytes(range(256)), 70000 * b"\xff",
        [], {}, {"": ""}, list(range(70000)), {str(n): n for n in range(70000)}, True, False, None,
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:10]!r}",
)  # fmt: skip
def test_round_trip_of_extremes(value: Any) -> None:
    for by in (codec, secret_codec):
        assert same(there_and_back({"v": value}, by), {"v": value})
        assert same(there_and_back({"v": [{"w": value}]}, by), {"v": [{"w": value}]})


class Text(str):
    __slots__ = ()


class Colour(str, enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    SEVEN = 7


class Huge(enum.IntEnum):
    HUSH = 2**63


class Real(float):
    pass


class Blob(bytes):
    pass


Point = namedtuple("Point", "x y")


def test_subclasses_arrive_as_what_they_extend() -> None:
    message = OrderedDict(
        {
            Text("type"): Text("x"),
            "colour": Colour.RED,
            "number": Number.SEVEN,
            "real": Real(1.5),
            "blob": Blob(b"b"),
            "point": Point(1, Counter("aab")),
            "list": type("List", (list,), {})([Number.SEVEN]),
        }
    )
    assert same(
        there_and_back(message),
        {
            "type": "x",
            "colour": "red",
            "number": 7,
            "real": 1.5,
            "blob": b"b",
            "point": [1, {"a": 2, "b": 1}],
            "list": [7],
        },
    )


def nested(depth: int) -> dict[str, Any]:
    """``depth`` dicts and lists within each other."""
    value: Any = 0
    for level in range(depth - 1):
        value = {"a": value} if level % 2 else [value]
    return {"a": value}


def test_nesting_up_to_256_levels() -> None:
    message = nested(256)
    assert there_and_back(message) == message
    assert encoding_error(nested(257)).endswith("is nested deeper than 256 levels")


# What senders are told


class SpecificError(Exception):
    pass


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ([("type", "hush")], "message must be a dict, not list"),
        (None, "message must be a dict, not NoneType"),
        ({"when": datetime(2020, 1, 1)}, 'message["when"] is of type datetime.datetime; '),
        (
            {"when": datetime(2020, 1, 1, tzinfo=timezone.utc)},
            'message["when"] is of type datetime.datetime; ',
        ),
        ({"a": {"b": [0, {"c": Decimal(1)}]}}, 'message["a"]["b"][1]["c"] is of type decimal.D'),
        ({"a": (0, {"hush"})}, 'message["a"][1] is of type set; a message can hold bytes, str,'),
        ({"a": msgpack.ExtType(5, b"hush")}, 'message["a"] is of type msgpack.ext.ExtType; '),
        ({"a": [msgpack.Timestamp(5, 6)]}, 'message["a"][0] is of type msgpack.ext.Timestamp; '),
        ({"a": 1 + 1j}, 'message["a"] is of type complex; '),
        ({"a": object}, 'message["a"] is of type type; '),
        ({"a": SpecificError("hush")}, f'message["a"] is of type {__name__}.SpecificError; '),
        ({"a": 2**63}, 'message["a"] is of type int and beyond 64 bits (signed)'),
        ({"a": [2**64 - 1]}, 'message["a"][0] is of type int and beyond 64 bits (signed)'),
        ({"a": 2**64}, 'message["a"] is of type int and beyond 64 bits (signed)'),
        ({"a": -(2**63) - 1}, 'message["a"] is of type int and beyond 64 bits (signed)'),
        ({"a": 10**5000}, 'message["a"] is of type int and beyond 64 bits (signed)'),
        (
            {"a": Huge.HUSH},
            f'message["a"] is of type {__name__}.Huge and beyond 64 bits (signed)',
        ),
        ({"counts": {1: "hush"}}, 'message["counts"] has a key of type int; keys must be str'),
        ({1: "hush"}, "message has a key of type int; keys must be str"),
        ({b"a": 1}, "message has a key of type bytes; keys must be str"),
        ({"a": [{None: 1}]}, 'message["a"][0] has a key of type NoneType; keys must be str'),
        ({"a": {(1, 2): 1}}, 'message["a"] has a key of type tuple; keys must be str'),
        ({"a": "hush\ud800"}, 'message["a"] is a str with a lone surrogate'),
        ({"a": {"b\udfff": 1}}, r'message["a"] has a key, "b\udfff", with a lone surrogate'),
        ({"ä\n": {1}}, r'message["\u00e4\n"] is of type set'),
        ({"ä": {1}}, 'message["ä"] is of type set'),
        ({"__asgi_group__": "hush"}, "message has a reserved key: __asgi_group__"),
        ({"__asgi_channel__": "hush"}, "message has a reserved key: __asgi_channel__"),
        ({"__asgi_encrypted__": "hush"}, "message has a reserved key: __asgi_encrypted__"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_what_a_message_cannot_hold(message: Any, text: str) -> None:
    shown = encoding_error(message)
    assert shown.startswith(text)
    assert "hush" not in shown


def test_reserved_keys_are_free_below_the_top() -> None:
    message = {"type": "x", "inner": {"__asgi_group__": "other", "__asgi_encrypted__": 1}}
    assert there_and_back(message) == message
    assert there_and_back(message, secret_codec) == message


def test_a_message_that_contains_itself() -> None:
    message: dict[str, Any] = {"a": [1]}
    message["a"].append(message)
    assert encoding_error(message) == 'message["a"][1] contains itself'
    itself: dict[str, Any] = {}
    itself["me"] = itself
    assert encoding_error(itself) == 'message["me"] contains itself'
    twins: list[Any] = []
    twins += [twins, twins]
    assert encoding_error({"a": {"b": twins}}) == 'message["a"]["b"][0] contains itself'


def test_the_same_container_twice_is_no_circle() -> None:
    inner = {"a": 1}
    assert there_and_back({"one": inner, "two": [inner, inner]}) == {
        "one": inner,
        "two": [inner, inner],
    }


@pytest.mark.parametrize("depth", [300, 600, 1100, 100_000])
def test_too_deep_whatever_msgpack_says(depth: int) -> None:
    assert encoding_error(nested(depth)).endswith("is nested deeper than 256 levels")


@pytest.mark.skipif(
    msgpack.Packer.__module__ == "msgpack.fallback",
    reason="msgpack without its C code needs the stack itself",
)
def test_encoding_needs_little_stack() -> None:
    """Python's own recursion isn't used: the caller may be deep in it already."""

    def deep_in_the_stack(levels: int) -> None:
        if levels:
            deep_in_the_stack(levels - 1)
            return
        assert codec.decode(codec.encode_for_group("g", nested(256))).group == "g"
        assert encoding_error(nested(257))

    used = 0
    frame: Any = sys._getframe()
    while frame is not None:
        used, frame = used + 1, frame.f_back
    deep_in_the_stack(sys.getrecursionlimit() - used - 100)


def test_long_keys_and_paths_are_shortened() -> None:
    message: dict[str, Any] = {}
    inner = message
    for _ in range(50):
        inner["k" * 100_000] = inner = {}
    inner["bad"] = {1}
    shown = encoding_error(message)
    assert len(shown) < 400
    assert shown.startswith('message["kkk')
    assert '["bad"] is of type set' in shown


@settings(deadline=None)
@given(
    st.recursive(
        st.one_of(
            atoms,
            st.integers(),
            st.just("s3cr3t\ud800"),
            st.just("s3cr3t"),
            st.sampled_from([bytearray(b"s3cr3t"), {"s3cr3t"}, Decimal(1), 2**63]),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.one_of(st.sampled_from(["a", "b", "\udfff", 1]), st.text(max_size=3)),
                inner,
                max_size=3,
            ),
        ),
    ).map(lambda value: {"v": value})
)
def test_any_message_arrives_or_is_refused_without_its_values(message: dict[str, Any]) -> None:
    error: TypeError | None = None
    try:
        arrived = there_and_back(message)
    except TypeError as exc:
        error = exc
    if error is None:
        assert same(arrived, as_received(message))
    else:
        assert str(error).startswith('message["v"]')
        assert "s3cr3t" not in str(error)


def test_max_message_size_is_that_of_the_body() -> None:
    message = {"type": "x", "text": "hush"}
    size = len(codec.encode_for_group("g", message))
    assert MessageCodec(max_message_size=size).encode_for_group("g", message)
    small = MessageCodec(max_message_size=size - 1)
    text = f"has {size} bytes; max_message_size is {size - 1}$"
    with pytest.raises(MessageTooLarge, match=text) as caught:
        small.encode_for_group("g", message)
    assert "hush" not in str(caught.value)
    # Others may have a larger limit.
    assert small.decode(codec.encode_for_group("g", message)).message() == message


def test_max_message_size_counts_the_encrypted_body() -> None:
    size = len(secret_codec.encode_for_group("g", {"type": "x"}))
    small = MessageCodec(max_message_size=size - 1, symmetric_encryption_keys=["new"])
    with pytest.raises(MessageTooLarge, match=f"has {size} bytes"):
        small.encode_for_group("g", {"type": "x"})


# Envelopes


@pytest.mark.parametrize("by", [codec, secret_codec], ids=["plain", "encrypted"])
def test_each_message_is_a_copy_of_its_own(by: MessageCodec) -> None:
    original = {"type": "x", "list": [{"a": 1}]}
    envelope = by.decode(by.encode_for_group("g", original))
    copies = [envelope.message() for _ in range(3)]
    assert copies == [original, original, original]
    copies[0]["list"][0]["a"] = 2
    copies[1]["list"].clear()
    del copies[1]["type"]
    assert copies[2] == original
    assert envelope.message() == original


@pytest.mark.parametrize("by", [codec, secret_codec], ids=["plain", "encrypted"])
def test_each_flat_message_is_a_copy_of_its_own(by: MessageCodec) -> None:
    """One with nothing in it that can be changed is copied in another way."""
    original = {"type": "x", "n": 1, "data": b"x", "text": "y", "on": True, "to": None, "f": 0.5}
    envelope = by.decode(by.encode_for_group("g", original))
    for _ in range(3):
        message = envelope.message()
        assert message == original
        message["type"] = "z"
        del message["n"]


@pytest.mark.parametrize("message", [{"type": "x"}, {"type": "x", "list": []}])
@pytest.mark.parametrize("by", [codec, secret_codec], ids=["plain", "encrypted"])
def test_a_channels_message_is_kept_once(by: MessageCodec, message: dict[str, Any]) -> None:
    size = 1_000_000
    body = by.encode_for_channel("a!b", {**message, "data": bytes(size)})
    tracemalloc.start()
    try:
        # As it comes from the connection: nobody else has these bytes.
        envelope = by.decode(bytes(bytearray(body)))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert envelope.message() == {**message, "data": bytes(size)}
    assert size <= kept < 1.1 * size


def test_an_envelope_shows_no_content() -> None:
    envelope = codec.decode(codec.encode_for_group("chat", {"text": "hush"}))
    assert repr(envelope) == f"<Envelope group='chat' size={envelope.size}>"
    envelope = codec.decode(codec.encode_for_channel("a!b", {"text": "hush"}))
    assert repr(envelope) == f"<Envelope channel='a!b' size={envelope.size}>"


# Malformed bodies


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not msgpack"),
        (b"hush", "not msgpack"),
        (b"\x81", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (b"\x81\xa1a", "not msgpack"),
        (b"\x81\xa1\xff\x01", "not msgpack"),
        (msgpack.packb({"__asgi_group__": "g"}) + b"\0", "not msgpack"),
        # A key that can't be hashed.
        (b"\x81\x90\x01", "not msgpack"),
        # Headers that promise 4 GiB.
        (b"\xdf\xff\xff\xff\xff", "not msgpack"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "not msgpack"),
        (b"\xdb\xff\xff\xff\xffhush", "not msgpack"),
        (10_000 * b"\x91", "not msgpack"),
        (10_000 * b"\x81\xa1a" + b"\0", "not msgpack"),
        (b"\0", "not a map"),
        (b"\xc0", "not a map"),
        (msgpack.packb("hush"), "not a map"),
        (msgpack.packb([{"__asgi_group__": "g"}]), "not a map"),
        (msgpack.packb({}), "no recipient"),
        (msgpack.packb({"type": "hush"}), "no recipient"),
        (msgpack.packb({b"__asgi_group__": "g"}), "no recipient"),
        (msgpack.packb({"__asgi_group__": "g", "__asgi_channel__": "c"}), "two recipients"),
        (msgpack.packb({"__asgi_group__": None, "__asgi_channel__": "c"}), "two recipients"),
        (b"\x82" + 2 * msgpack.packb({"__asgi_group__": "g"})[1:], "a key comes twice"),
        (b"\xde\0\2" + 2 * msgpack.packb({"__asgi_group__": "g"})[1:], "a key comes twice"),
        (b"\xdf\0\0\0\2" + 2 * msgpack.packb({"__asgi_channel__": "g"})[1:], "a key comes twice"),
        *[
            (msgpack.packb({"__asgi_group__": recipient}), "not a non-empty string")
            for recipient in (None, "", b"g", 1, ["g"], {"g": "g"}, True)
        ],
        (msgpack.packb({"__asgi_channel__": b"c"}), "not a non-empty string"),
        (msgpack.packb({"__asgi_group__": "g", "__asgi_encrypted__": b"t"}), "encrypted, but no"),
    ],
    ids=lambda value: repr(value[:25]),
)
def test_malformed_bodies(body: bytes, problem: str) -> None:
    text = malformed(body)
    assert problem in text
    assert "hush" not in text


@pytest.mark.parametrize(
    "extension",
    [
        msgpack.ExtType(1, b"hush"),
        msgpack.ExtType(127, b""),
        msgpack.Timestamp(1),
        msgpack.Timestamp(2**33, 1),
        msgpack.Timestamp(-1, 1),
    ],
    ids=repr,
)
def test_extension_types_are_malformed(extension: Any) -> None:
    recipient = {"__asgi_group__": "g"}
    for holder in (extension, [0, [extension]], {"a": {"b": extension}}, {extension: 1}):
        body = msgpack.packb({**recipient, "v": holder})
        assert malformed(body) == "a msgpack extension type"
    assert malformed(msgpack.packb({**recipient, extension: 1})) == "a msgpack extension type"


def test_a_timestamp_with_a_longer_header_is_malformed() -> None:
    head = msgpack.packb({"__asgi_group__": "g", "v": 0})[:-1]
    for body in (
        head + b"\xc7\x04\xff" + bytes(4),
        head + b"\xc8\0\x08\xff" + bytes(8),
        head + b"\xc9\0\0\0\x0c\xff" + bytes(12),
    ):
        assert malformed(body) == "a msgpack extension type"
    for body in (head + b"\xd4\xff\0", head + b"\xc7\x00\xff"):
        assert malformed(body) in ("a msgpack extension type", "not msgpack")


def test_the_byte_of_timestamps_is_free_elsewhere() -> None:
    message = {"b": b"\xd6\xff\0\0\0\0", "n": [-1, 255, 65535], "f": math.nan}
    assert same(there_and_back(message), message)


def test_a_key_twice_in_a_map_of_any_size() -> None:
    """The header's count is compared with the keys found, in each of its three forms."""
    for keys in (1, 14, 15, 16, 200, 65534, 65535, 65536):
        message: dict[str, Any] = {str(n): n for n in range(keys)}
        body = msgpack.packb({**message, "__asgi_group__": "g"})
        assert codec.decode(body).message() == message
        pairs = msgpack.packb({"0": 0})[1:] + msgpack.packb({"__asgi_group__": "g"})[1:]
        pairs += b"".join(msgpack.packb({str(n): n})[1:] for n in range(keys))
        assert malformed(b"\xdf" + struct.pack(">I", keys + 2) + pairs) == "a key comes twice"


foreign = st.recursive(
    st.one_of(
        atoms,
        st.integers(-(2**63), 2**64 - 1),
        st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
        st.builds(msgpack.Timestamp, st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**9 - 1)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(), st.integers(-9, 9), st.none()), inner, max_size=4),
    ),
)
reserved = st.sampled_from(["__asgi_group__", "__asgi_channel__", "__asgi_encrypted__"])
bodies = st.one_of(
    st.binary(),
    foreign.map(msgpack.packb),
    st.dictionaries(st.one_of(reserved, st.text()), foreign, max_size=4).map(msgpack.packb),
    messages.map(lambda message: codec.encode_for_group("g", message)),
    messages.map(lambda message: secret_codec.encode_for_channel("c", message)),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Some body with some bytes changed, dropped or put in."""
    body = bytearray(draw(bodies))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, min(len(body), start + 4)))
        body[start:end] = draw(st.binary(max_size=6))
    return bytes(body)


@given(damaged())
@example(b"\x81\xae__asgi_group__\xa1g")
def test_any_body_gives_an_envelope_or_malformed(body: bytes) -> None:
    for by in (codec, secret_codec):
        try:
            envelope: Envelope | None = by.decode(body)
        except MalformedBody:
            continue
        assert envelope is not None
        assert (envelope.group is None) != (envelope.channel is None)
        recipient = envelope.channel if envelope.group is None else envelope.group
        assert isinstance(recipient, str)
        assert recipient
        assert envelope.size == len(body)
        first = envelope.message()
        assert same(first, envelope.message())
        assert not {"__asgi_group__", "__asgi_channel__"}.intersection(first)


@given(st.dictionaries(reserved, st.one_of(foreign, st.text(min_size=1)), max_size=3), messages)
def test_recipients_are_found_or_refused(
    recipients: dict[str, Any], message: dict[str, Any]
) -> None:
    body = msgpack.packb({**message, **recipients})
    proper = len(recipients) == 1 and "__asgi_encrypted__" not in recipients
    proper = proper and all(isinstance(name, str) and name for name in recipients.values())
    try:
        envelope = codec.decode(body)
    except MalformedBody:
        assert not proper
        return
    assert proper
    assert {envelope.group, envelope.channel} == {None, *recipients.values()}
    assert same(envelope.message(), as_received(message))


# Encryption


def fernet_of(key: bytes) -> Fernet:
    """As channels_redis stretches its keys."""
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(key).digest()))


def test_the_first_key_encrypts_the_message_but_not_the_recipient() -> None:
    body = secret_codec.encode_for_group("chat", {"type": "x", "text": "hush"})
    assert b"hush" not in body
    content = msgpack.unpackb(body)
    assert content.keys() == {"__asgi_group__", "__asgi_encrypted__"}
    assert content["__asgi_group__"] == "chat"
    packed = fernet_of(b"new").decrypt(content["__asgi_encrypted__"])
    assert msgpack.unpackb(packed) == {"type": "x", "text": "hush"}


def test_every_key_decrypts() -> None:
    old = MessageCodec(max_message_size=1000, symmetric_encryption_keys=["old"])
    body = old.encode_for_channel("a!b", {"type": "x"})
    assert secret_codec.decode(body).message() == {"type": "x"}
    # Text and bytes are the same key.
    assert there_and_back({"type": "x"}, old) == {"type": "x"}


def test_another_key_is_malformed() -> None:
    other = MessageCodec(max_message_size=1000, symmetric_encryption_keys=["other"])
    body = other.encode_for_group("g", {"type": "x"})
    assert "symmetric_encryption_keys" in malformed(body, secret_codec)


def test_plain_and_encrypted_do_not_mix() -> None:
    plain = codec.encode_for_group("g", {"type": "x"})
    assert malformed(plain, secret_codec).startswith("not encrypted, but")
    encrypted = secret_codec.encode_for_group("g", {"type": "x"})
    assert malformed(encrypted).startswith("encrypted, but no symmetric_encryption_keys")


def sealed(packed: bytes) -> bytes:
    token = fernet_of(b"new").encrypt(packed)
    body: bytes = msgpack.packb({"__asgi_group__": "g", "__asgi_encrypted__": token})
    return body


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            msgpack.packb({"__asgi_group__": "g", "__asgi_encrypted__": token}),
            "not a recipient and an encrypted message",
        )
        for token in (None, 1, "text", [b"token"])
    ]
    + [
        (
            msgpack.packb({"__asgi_group__": "g", "__asgi_encrypted__": token}),
            "encrypted with a key that symmetric_encryption_keys lacks",
        )
        for token in (b"", b"token", b"\xff\0", os.urandom(200), 1000 * b"A")
    ]
    + [
        (
            msgpack.packb({**msgpack.unpackb(sealed(msgpack.packb({}))), "type": "x"}),
            "not a recipient and an encrypted message",
        ),
        (
            msgpack.packb({"__asgi_encrypted__": fernet_of(b"new").encrypt(msgpack.packb({}))}),
            "no recipient",
        ),
        (sealed(b"\xc1"), "not msgpack"),
        (sealed(b""), "not msgpack"),
        (sealed(msgpack.packb([])), "not a map"),
        (sealed(msgpack.packb({"a": msgpack.Timestamp(1)})), "a msgpack extension type"),
        (sealed(msgpack.packb({"__asgi_group__": "g"})), "a reserved key in the encrypted"),
        (sealed(msgpack.packb({"__asgi_encrypted__": b""})), "a reserved key in the encrypted"),
    ],
)
def test_malformed_encrypted_bodies(body: bytes, problem: str) -> None:
    assert re.search(problem, malformed(body, secret_codec))


# Messages that wait long


def kept_for(message: dict[str, Any], *, for_group: bool, compacted: bool) -> int:
    """Bytes of memory that 20 such messages take, for each."""
    codec = MessageCodec(max_message_size=2**20)
    encode = codec.encode_for_group if for_group else codec.encode_for_channel
    body = encode("g" if for_group else "x!y", message)
    gc.collect()
    tracemalloc.start()
    try:
        envelopes = [codec.decode(bytes(bytearray(body))) for _ in range(20)]
        if compacted:
            for envelope in envelopes:
                envelope.compact()
        size = tracemalloc.get_traced_memory()[0] // 20
    finally:
        tracemalloc.stop()
    assert envelopes[0].message() == message
    return size


@pytest.mark.parametrize("for_group", [False, True])
@pytest.mark.parametrize(
    "message",
    [
        {"type": "t", "rows": [{"id": n, "on": True, "t": "x"} for n in range(500)]},
        {"type": "t", "empty": [{} for _ in range(2000)]},
        # Above 1024: Python has the small numbers once for all.
        {"type": "t", **{f"key{n}": n for n in range(2000, 2500)}},
    ],
    ids=["rows", "empty", "many keys"],
)
def test_a_compact_message_takes_little_more_than_its_body(
    message: dict[str, Any], for_group: bool
) -> None:
    body = len(msgpack.packb(message))
    assert kept_for(message, for_group=for_group, compacted=False) > 4 * body
    assert kept_for(message, for_group=for_group, compacted=True) < 1.25 * body + 1000


@pytest.mark.parametrize("keys", [(), ("a key of 32 bytes, or so",)])
@pytest.mark.parametrize("for_group", [False, True])
@pytest.mark.parametrize(
    "message", [{"type": "t", "n": 1}, {"type": "t", "list": [1, {"a": b"b"}]}]
)
def test_a_compact_message_is_the_same_and_each_members_own(
    message: dict[str, Any], for_group: bool, keys: tuple[str, ...]
) -> None:
    codec = MessageCodec(max_message_size=1000, symmetric_encryption_keys=keys)
    encode = codec.encode_for_group if for_group else codec.encode_for_channel
    envelope = codec.decode(encode("g" if for_group else "x!y", message))
    envelope.compact()
    envelope.compact()
    first = envelope.message()
    assert first == message
    if for_group:
        first["more"] = 1
        assert envelope.message() == message


def test_a_message_that_nests_too_deep_to_be_packed_is_kept_as_it_is() -> None:
    deep: Any = 1
    body = msgpack.packb({"__asgi_channel__": "x!y"})
    for _ in range(600):
        deep = [deep]
    nested = b"\x91" * 600 + b"\x01"
    body = b"\x82" + body[1:] + msgpack.packb("deep") + nested
    envelope = MessageCodec(max_message_size=1000).decode(body)
    envelope.compact()
    assert envelope.message() == {"deep": deep}
