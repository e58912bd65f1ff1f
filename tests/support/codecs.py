"""Codecs, and what they make of good messages and of bad ones."""

from __future__ import annotations

from typing import Any

import pytest

from channels_rabbitmq._codec import MessageCodec

codec = MessageCodec(max_message_size=2**24)


secret_codec = MessageCodec(max_message_size=2**24, symmetric_encryption_keys=["new", b"old"])


def there_and_back(message: dict[str, Any], by: MessageCodec = codec) -> dict[str, Any]:
    envelope = by.decode(by.encode_for_channel("a!b", message))
    assert (envelope.channel, envelope.group) == ("a!b", None)
    return envelope.message()


def encoding_error(message: Any) -> str:
    """The text of the TypeError; it chains nothing, as msgpack's errors may hold values."""
    texts = set()
    for by in (codec, secret_codec):
        with pytest.raises(TypeError) as caught:
            by.encode_for_group("g", message)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        texts.add(str(caught.value))
    assert len(texts) == 1
    return texts.pop()


def same(one: Any, other: Any) -> bool:
    """Equal in type, too (1, 1.0 and True aren't), and NaN is NaN."""
    return repr(one) == repr(other)
