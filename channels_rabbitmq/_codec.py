"""The wire format: write a message and its recipient as the body of an AMQP message, and read it.

A body is one msgpack map: the message and one more key, which names the
recipient: ``"__asgi_group__"`` or ``"__asgi_channel__"``. With encryption the
map holds the recipient's key and ``"__asgi_encrypted__"``, a Fernet token of
the message's msgpack map. The recipient stays readable.

With another serializer than msgpack (``_serializers``), two keys take the place
of the message: ``"__asgi_serializer__"``, the serializer's name, and
``"__asgi_serialized__"``, its bytes. Encryption wraps these two as it wraps a
message. So each body says what it is, and a receiver with other settings can
say so in the log.

Encoding is strict, so an unsuitable message fails where it is sent and not in
the processes that receive it. msgpack's C code does the work and refuses most
unsuitable values. A quick walk over the containers finds the ones that msgpack
accepts: keys that aren't strings, ``bytearray``, integers above 63 bits, and
msgpack's own extension types. ``_plain_messages`` looks at a message in detail
only if it failed. It replaces each proxy by the object behind it, or raises an
error that names the place.

Decoding accepts more, for the sake of other programs: keys that aren't strings,
below or beside the recipient. Any bytes give an ``Envelope`` or raise
``MalformedBody``.

No error holds a value of a message, or chains an error that does. The errors of
msgpack and of Python's codecs often hold the whole text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import msgpack
from channels.exceptions import MessageTooLarge

from ._plain_messages import MAX_DEPTH, MAX_INT, is_container, plain_copy, type_name
from ._serializers import MSGPACK, Serializer
from .exceptions import UnreadableMessage

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

GROUP_KEY = "__asgi_group__"
CHANNEL_KEY = "__asgi_channel__"
ENCRYPTED_KEY = "__asgi_encrypted__"
SERIALIZER_KEY = "__asgi_serializer__"
SERIALIZED_KEY = "__asgi_serialized__"
_RECIPIENT_OR_ENCRYPTED = frozenset({GROUP_KEY, CHANNEL_KEY, ENCRYPTED_KEY})
_RESERVED_KEYS = _RECIPIENT_OR_ENCRYPTED | {SERIALIZER_KEY, SERIALIZED_KEY}
_NAME_OF_SERIALIZER = re.compile("[a-zA-Z0-9_.<>]{1,200}")

_ATOMS = frozenset({str, bytes, float, bool, type(None)})
_FLAT_TYPES = _ATOMS | {int}
# Bytes of a member's info, packed: one answer may hold those of thousands.
LONGEST_INFO = 4096
# A message without containers and with at most so many keys takes its size and some overhead.
_FEW_KEYS = 16
_CONTAINERS = frozenset({dict, list, tuple})


class MalformedBody(ValueError):
    """A body that isn't a channel-layer message. The text gives the reason, no part of the body."""


class OtherSettings(MalformedBody):
    """A body that isn't readable here, but perhaps where the key or the serializer is another."""


class Envelope:
    """A decoded body: the message and its recipient."""

    __slots__ = ("_message", "_packed", "channel", "flat", "group", "size")

    # One of the two is set, and not empty; the other is None.
    group: str | None
    channel: str | None
    # Bytes of the body as received.
    size: int

    def __init__(
        self,
        group: str | None,
        channel: str | None,
        size: int,
        packed: bytes,
        message: dict[str, Any],
    ) -> None:
        """``message`` was unpacked from ``packed``, which may hold the recipient, too."""
        self.group = group
        self.channel = channel
        self.size = size
        # None once this object was handed out and further calls need copies.
        self._message: dict[str, Any] | None = message
        # A group's message without containers. A shallow copy is as good as unpacking the message
        # again, and takes a tenth of the time.
        self.flat: dict[str, Any] | None = None
        # Kept for a group's other messages: further copies are unpacked from it. For all other
        # messages it would only double the memory.
        self._packed: bytes | None = None
        if group is not None:
            if _FLAT_TYPES.issuperset(map(type, message.values())):
                self.flat = message
            else:
                self._packed = packed

    def message(self) -> dict[str, Any]:
        """Return the message without its recipient.

        A group's message has many receivers, so each call returns a copy of its own. A direct
        message has one receiver, so repeated calls may return the same object.
        """
        if self.flat is not None:
            return self.flat.copy()
        message = self._message
        if message is None:
            again: dict[str, Any] = msgpack.unpackb(self._packed, strict_map_key=False)
            again.pop(GROUP_KEY, None)  # An encrypted message doesn't hold it.
            return again
        if self._packed is not None:
            self._message = None
        return message

    def compact(self) -> None:
        """Keep only the packed message, because it may wait long.

        An unpacked list of small values takes up to 75 times its packed size. The bound for
        channels that are behind counts the packed size.
        """
        message = self._message
        if message is None or (
            len(message) <= _FEW_KEYS and _FLAT_TYPES.issuperset(map(type, message.values()))
        ):
            return
        if self._packed is None:
            try:
                self._packed = msgpack.packb(message)
            except (ValueError, RecursionError):
                return  # Other programs may nest deeper than msgpack packs.
        self._message = self.flat = None

    def __repr__(self) -> str:
        recipient = f"channel={self.channel!r}" if self.group is None else f"group={self.group!r}"
        return f"<Envelope {recipient} size={self.size}>"


class SerializedEnvelope(Envelope):
    """The envelope of a message that another serializer than msgpack has packed."""

    __slots__ = ("_serializer",)

    def __init__(
        self,
        group: str | None,
        channel: str | None,
        size: int,
        packed: bytes,
        message: dict[str, Any],
        serializer: Serializer,
    ) -> None:
        super().__init__(group, channel, size, packed, message)
        # Kept for a channel's message, too: to make it again may fail, or give something else.
        self._packed = packed
        self._serializer = serializer

    def message(self) -> dict[str, Any]:
        """As ``Envelope.message``; raises UnreadableMessage if the serializer fails later."""
        if self.flat is not None:
            return self.flat.copy()
        message, self._message = self._message, None
        if message is None:
            assert self._packed is not None, "it is always kept"
            try:
                return _deserialize(self._serializer, self._packed)
            except MalformedBody as err:
                problem = str(err)
            raise UnreadableMessage(f"A message can't be read again: {problem}")
        return message

    def compact(self) -> None:
        self._message = self.flat = None


class MessageCodec:
    """Makes bodies from messages and messages from bodies. Any thread may use it.

    ``max_message_size`` is the largest body, in bytes, that encoding makes.
    Decoding takes any size. Of ``symmetric_encryption_keys`` the first encrypts
    and all decrypt; they need the package ``cryptography``. Without a
    ``serializer`` messages are packed with msgpack.
    """

    def __init__(
        self,
        *,
        max_message_size: int,
        symmetric_encryption_keys: Sequence[str | bytes] = (),
        serializer: Serializer | None = None,
    ) -> None:
        self._serializer = serializer
        self._max_message_size = max_message_size
        self._fernet = _make_fernet(symmetric_encryption_keys)

    def encode_for_channel(self, channel: str, message: dict[str, Any]) -> bytes:
        """Return the body that brings ``message`` to ``channel``; don't change the message.

        Raises ``TypeError`` for a value that a message can't hold, naming its
        place, or ``channels.exceptions.MessageTooLarge``.
        """
        return self._encode(CHANNEL_KEY, channel, message)

    def encode_for_group(self, group: str, message: dict[str, Any]) -> bytes:
        """Return the body for all members of ``group``; raise like ``encode_for_channel``."""
        return self._encode(GROUP_KEY, group, message)

    def decode(self, body: bytes) -> Envelope:
        """Read a body. For any bytes, the only exception is ``MalformedBody``."""
        content = _unpack_map(body)
        is_for_group = GROUP_KEY in content
        if is_for_group == (CHANNEL_KEY in content):
            raise MalformedBody(
                "two recipients: a group and a channel" if is_for_group else "no recipient"
            )
        recipient = content.pop(GROUP_KEY if is_for_group else CHANNEL_KEY)
        if not isinstance(recipient, str) or not recipient:
            raise MalformedBody("a recipient that is not a non-empty string")

        packed = body
        if self._fernet is not None:
            packed, content = self._decrypt(content)
        elif ENCRYPTED_KEY in content:
            raise OtherSettings("encrypted, but no symmetric_encryption_keys are set")
        group, channel = (recipient, None) if is_for_group else (None, recipient)
        serializer = self._serializer
        if serializer is None and SERIALIZER_KEY not in content:
            return Envelope(group, channel, len(body), packed, content)
        serialized = _unwrap(content, serializer)
        assert serializer is not None, "else _unwrap() has raised"
        message = _deserialize(serializer, serialized)
        return SerializedEnvelope(group, channel, len(body), serialized, message, serializer)

    def _encode(self, recipient_key: str, recipient: str, message: dict[str, Any]) -> bytes:
        if type(message) is not dict and not issubclass(type(message), dict):
            message = plain_copy(message)
        if not _RESERVED_KEYS.isdisjoint(message):
            raise _reserved_key(message)
        if self._serializer is not None:
            message = _wrap(message, self._serializer)
        if self._fernet is None:
            body = _pack({**message, recipient_key: recipient})
            if body is None:
                body = _pack_plain(message, {recipient_key: recipient})
        else:
            packed = _pack({**message})
            if packed is None:
                packed = _pack_plain(message, {})
            token = self._fernet.encrypt(packed)
            body = msgpack.packb({recipient_key: recipient, ENCRYPTED_KEY: token})
        if len(body) > self._max_message_size:
            raise MessageTooLarge(
                f"the encoded message has {len(body)} bytes; "
                f"max_message_size is {self._max_message_size}"
            )
        return body

    def _decrypt(self, content: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Return the packed and the unpacked message of the map that holds the token."""
        assert self._fernet is not None
        if ENCRYPTED_KEY not in content:
            raise OtherSettings("not encrypted, but symmetric_encryption_keys are set")
        token = content[ENCRYPTED_KEY]
        if len(content) != 1 or not isinstance(token, bytes):
            raise MalformedBody("not a recipient and an encrypted message")
        packed: bytes | None
        try:
            packed = self._fernet.decrypt(token)
        except Exception:  # InvalidToken is documented, but any error means: not with our keys.
            packed = None
        if packed is None:
            raise OtherSettings("encrypted with a key that symmetric_encryption_keys lacks")
        message = _unpack_map(packed)
        if not _RECIPIENT_OR_ENCRYPTED.isdisjoint(message):
            raise MalformedBody("a reserved key in the encrypted message")
        return packed, message


def pack_info(info: dict[str, Any]) -> bytes:
    """Pack the info of a group's member.

    Raises ``TypeError`` for a value that a message can't hold, naming its place, or
    ``channels.exceptions.MessageTooLarge``.
    """
    packed = _pack({**info}) if issubclass(type(info), dict) else None
    if packed is None:
        packed = _pack(plain_copy(info, "info"))
    if packed is None:
        raise TypeError("info can't be encoded by msgpack")
    if len(packed) > LONGEST_INFO:
        raise MessageTooLarge(
            f"the encoded info has {len(packed)} bytes; it may have {LONGEST_INFO}"
        )
    return packed


def unpack_info(packed: bytes) -> dict[str, Any]:
    """Unpack a member's info. For any bytes, the only exception is ``MalformedBody``."""
    return _unpack_map(packed)


def _wrap(message: dict[str, Any], serializer: Serializer) -> dict[str, Any]:
    """Return what takes the place of the message in a body."""
    serialized = serializer.serialize(message)
    if type(serialized) is not bytes:
        raise TypeError(
            f"the serializer {serializer.name} must return bytes, not {type_name(serialized)}"
        )
    return {SERIALIZER_KEY: serializer.name, SERIALIZED_KEY: serialized}


def _unwrap(content: dict[str, Any], serializer: Serializer | None) -> bytes:
    """Return what ``_wrap`` has put into a body, if that was with the same serializer."""
    expected = MSGPACK if serializer is None else serializer.name
    name = content.get(SERIALIZER_KEY, MSGPACK)
    if name != expected:
        # Anything could be here, also what doesn't belong into a log.
        is_name = isinstance(name, str) and _NAME_OF_SERIALIZER.fullmatch(name)
        other = f"the serializer {name}" if is_name else "a serializer without a proper name"
        raise OtherSettings(f"by {other}, while it is {expected} here")
    serialized = content.get(SERIALIZED_KEY)
    if len(content) != 2 or not isinstance(serialized, bytes):
        raise MalformedBody("not a recipient and a serialized message")
    return serialized


def _deserialize(serializer: Serializer, serialized: bytes) -> dict[str, Any]:
    """Return the message. The only exception is MalformedBody."""
    message: object
    try:
        message = serializer.deserialize(serialized)
    except Exception as exc:  # It may be the project's code.
        problem = f"{type(exc).__name__} was raised by deserialize()"
    else:
        if isinstance(message, dict):
            return message
        problem = f"deserialize() returned a {type_name(message)}, not a dict"
    raise MalformedBody(f"{problem}, of the serializer {serializer.name}")


def _make_fernet(keys: Sequence[str | bytes]) -> MultiFernet | None:
    if not keys:
        return None
    from cryptography.fernet import Fernet, MultiFernet  # an extra

    # Fernet wants 32 bytes in base64. Keys of any length are made into 32 bytes
    # as in channels_redis, so that a project may keep its keys.
    digests = [hashlib.sha256(key.encode() if isinstance(key, str) else key) for key in keys]
    return MultiFernet([Fernet(base64.urlsafe_b64encode(digest.digest())) for digest in digests])


def _pack(content: dict[str, Any]) -> bytes | None:
    """Return ``content`` as msgpack; None if a value in it can't be sent as it is."""
    try:
        packed: bytes = msgpack.Packer().pack(content)  # as packb(), without a call and a dict
        # Pack first: packing ends soon if the message contains itself. The walk would not end.
        if _is_flat(content) or _is_carriable(content):
            return packed
    except MemoryError:
        raise
    except Exception:  # Without its C code msgpack uses proxies, which may raise any exception.
        return None
    return None


def _pack_plain(message: dict[str, Any], recipient: dict[str, str]) -> bytes:
    """Pack a message that ``_pack`` refused; raise TypeError if it can't hold one of its values."""
    message = plain_copy(message)
    if not _RESERVED_KEYS.isdisjoint(message):
        raise _reserved_key(message)
    packed = _pack({**message, **recipient})
    if packed is None:
        raise TypeError("message can't be encoded by msgpack")  # It has a str of 4 GiB, say.
    return packed


def _reserved_key(message: dict[str, Any]) -> TypeError:
    reserved = sorted(_RESERVED_KEYS.intersection(message))
    return TypeError(f"message has a reserved key: {reserved[0]}")


def _is_flat(message: dict[str, Any]) -> bool:
    """Whether a message that msgpack packed has only keys and values of the exact plain types.

    Most messages have no containers and no subclasses. ``_is_carriable`` takes twice the time.
    """
    for key, value in message.items():
        value_type = type(value)
        if type(key) is not str or not (
            value_type in _ATOMS or (value_type is int and value <= MAX_INT)
        ):
            return False
    return True


def _is_carriable(message: dict[str, Any]) -> bool:
    """Whether a message that msgpack packed holds only values that the specification allows.

    This runs for each message with containers, so it makes as few calls as it can.
    """
    level: list[Any] = [message]
    for _ in range(MAX_DEPTH):
        next_level: list[Any] = []
        for container in level:
            if isinstance(container, dict):
                for key in container:
                    if type(key) is not str and not isinstance(key, str):
                        return False
                values = container.values()
            else:
                values = container
            for value in values:
                value_type = type(value)
                if value_type in _ATOMS:
                    continue
                if value_type is int:
                    if value > MAX_INT:
                        return False
                elif value_type in _CONTAINERS:
                    next_level.append(value)
                # The rest are subclasses, such as enumerations and Django's SafeString.
                elif isinstance(value, int):
                    if value > MAX_INT:
                        return False
                elif is_container(value):
                    next_level.append(value)
                elif not isinstance(value, (str, bytes, float)):
                    return False
        if not next_level:
            return True
        level = next_level
    return False


def _unpack_map(packed: bytes) -> dict[str, Any]:
    """Unpack one msgpack map, of any values. The only exception is MalformedBody."""
    content: Any
    try:
        content = msgpack.unpackb(packed, strict_map_key=False, ext_hook=_refuse_extension)
    # msgpack raises other errors than its own, too: UnicodeDecodeError, TypeError for a key that
    # can't be hashed, MemoryError for a header that announces too much.
    except Exception as exc:
        problem = str(exc) if isinstance(exc, MalformedBody) else "not msgpack"
    else:
        if not isinstance(content, dict):
            problem = "not a map"
        # The first byte holds the number of keys up to 15.
        elif len(content) != (packed[0] - 0x80 if packed[0] < 0x90 else _map_length(packed)):
            problem = "a key comes twice"
        # msgpack doesn't call ext_hook for a timestamp. Its type code is the byte 255.
        # Text and most numbers don't hold that byte, so few bodies need the search.
        elif b"\xff" in packed and _holds_timestamp(content):
            problem = "a msgpack extension type"
        else:
            return content
    raise MalformedBody(problem)


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise MalformedBody("a msgpack extension type")


def _map_length(packed: bytes) -> int:
    """Return how many keys a map's header announces, if they are more than 15."""
    return int.from_bytes(packed[1:3] if packed[0] == 0xDE else packed[1:5], "big")


def _holds_timestamp(content: dict[Any, Any]) -> bool:
    pending: list[Any] = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value)
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, msgpack.Timestamp):
            return True
    return False
