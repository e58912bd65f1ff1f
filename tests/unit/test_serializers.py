"""The option ``serializer``: JSON, a project's own class, and bodies that say which it was."""

from __future__ import annotations

import datetime
import decimal
import json
import pickle
import sys
import uuid
from pathlib import Path
from typing import Any

import msgpack
import pytest
from channels.exceptions import InvalidChannelLayerError, MessageTooLarge
from django.utils.functional import SimpleLazyObject, lazystr

from channels_rabbitmq._codec import MalformedBody, MessageCodec
from channels_rabbitmq._serializers import load_serializer
from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import UnreadableMessage


class Pickled:
    """As a project has it for channels_redis."""

    def serialize(self, message: dict[str, Any]) -> bytes:
        return pickle.dumps(message)

    def deserialize(self, packed: bytes) -> Any:
        return pickle.loads(packed)


def codec_with(
    serializer: type[Any] | str, keys: tuple[str, ...] = (), size: int = 2**24
) -> MessageCodec:
    return MessageCodec(
        max_message_size=size,
        symmetric_encryption_keys=keys,
        serializer=load_serializer(serializer),
    )


JSON = codec_with("json")
SECRET_JSON = codec_with("json", ("key",))
OWN = codec_with(Pickled)
OWN_NAME = f"{__name__}.Pickled"
BY_NAME = {"msgpack": codec_with("msgpack"), "json": JSON, OWN_NAME: OWN}


def there_and_back(message: dict[str, Any], by: MessageCodec = JSON) -> dict[str, Any]:
    return by.decode(by.encode_for_channel("a!b", message)).message()


# JSON


@pytest.mark.parametrize("by", [JSON, SECRET_JSON], ids=["plain", "encrypted"])
def test_json_takes_what_djangos_encoder_takes(by: MessageCodec) -> None:
    message = {
        "type": "x",
        "at": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
        "on": datetime.date(2026, 1, 2),
        "for": datetime.timedelta(minutes=5),
        "id": uuid.UUID(int=7),
        "price": decimal.Decimal("1.50"),
        "text": lazystr("später"),
        "lazy": SimpleLazyObject(lambda: {"user": SimpleLazyObject(lambda: "ann")}),
        "nested": [(1, 2.5, None, True)],
    }
    assert there_and_back(message, by) == {
        "type": "x",
        "at": "2026-01-02T03:04:05Z",
        "on": "2026-01-02",
        "for": "P0DT00H05M00S",
        "id": "00000000-0000-0000-0000-000000000007",
        "price": "1.50",
        "text": "später",
        "lazy": {"user": "ann"},
        "nested": [[1, 2.5, None, True]],
    }


def test_json_makes_text_of_keys() -> None:
    message = {"type": "x", "counts": {7: "a", 2.5: "b", None: "c", True: "d"}}
    counts = {"7": "a", "2.5": "b", "null": "c", "true": "d"}
    assert there_and_back(message) == {"type": "x", "counts": counts}


class Hushed:
    pass


def _with_itself() -> dict[str, Any]:
    message: dict[str, Any] = {"type": "hush"}
    message["list"] = [message]
    return message


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("hush", "message must be a dict, not str"),
        ({"__asgi_group__": "hush"}, "message has a reserved key: __asgi_group__"),
        ({"__asgi_serializer__": "hush"}, "message has a reserved key: __asgi_serializer__"),
        ({"a": [{"b": b"hush"}]}, 'message["a"][0]["b"] is of type bytes, which JSON can\'t hold'),
        ({"a": memoryview(b"hush")}, 'message["a"] is of type memoryview, which JSON can\'t hold'),
        ({"a": {"hush"}}, 'message["a"] is of type set, which JSON can\'t hold'),
        ({"a": Hushed()}, f'message["a"] is of type {__name__}.Hushed, which JSON can\'t hold'),
        ({"a": {("hush",): 1}}, 'message["a"] has a key of type tuple; JSON makes text of'),
        ({"a": "hush\ud800"}, 'message["a"] is a str with a lone surrogate'),
        ({"a": {"\ud800": "hush"}}, 'message["a"] has a key with a lone surrogate'),
        (_with_itself(), "contains itself, or is nested deeper than 256 levels"),
    ],
    ids=range(11),
)
@pytest.mark.parametrize("by", [JSON, SECRET_JSON], ids=["plain", "encrypted"])
def test_what_json_cannot_hold(by: MessageCodec, message: Any, problem: str) -> None:
    with pytest.raises(TypeError) as caught:
        by.encode_for_group("g", message)
    assert problem in str(caught.value)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_the_size_is_that_of_the_whole_body() -> None:
    size = len(JSON.encode_for_group("g", {"type": "x"}))
    assert codec_with("json", size=size).encode_for_group("g", {"type": "x"})
    with pytest.raises(MessageTooLarge):
        codec_with("json", size=size - 1).encode_for_group("g", {"type": "x"})


# Bodies


def test_bodies_on_the_wire() -> None:
    """4.x and other programs read the first; the manual describes the second."""
    message = {"type": "x", "n": 1}
    body = codec_with("msgpack").encode_for_group("g", message)
    assert body == msgpack.packb({**message, "__asgi_group__": "g"})
    assert msgpack.unpackb(JSON.encode_for_channel("a!b", message)) == {
        "__asgi_channel__": "a!b",
        "__asgi_serializer__": "json",
        "__asgi_serialized__": b'{"type":"x","n":1}',
    }


@pytest.mark.parametrize("receiver", BY_NAME)
@pytest.mark.parametrize("sender", BY_NAME)
def test_a_body_of_another_serializer_is_told_in_words(sender: str, receiver: str) -> None:
    message = {"type": "hush"}
    body = BY_NAME[sender].encode_for_group("g", message)
    if sender == receiver:
        assert BY_NAME[receiver].decode(body).message() == message
        return
    with pytest.raises(MalformedBody) as caught:
        BY_NAME[receiver].decode(body)
    assert str(caught.value) == f"by the serializer {sender}, while it is {receiver} here"


def test_encryption_hides_the_serializer_too() -> None:
    body = SECRET_JSON.encode_for_group("g", {"type": "x"})
    assert set(msgpack.unpackb(body)) == {"__asgi_group__", "__asgi_encrypted__"}
    with pytest.raises(MalformedBody, match="by the serializer json, while it is msgpack here"):
        codec_with("msgpack", ("key",)).decode(body)
    with pytest.raises(MalformedBody, match="encrypted, but no symmetric_encryption_keys"):
        JSON.decode(body)


def _body(**content: object) -> bytes:
    body: bytes = msgpack.packb({"__asgi_group__": "g", **content})
    return body


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (_body(__asgi_serializer__="json"), "not a recipient and a serialized message"),
        (
            _body(__asgi_serializer__="json", __asgi_serialized__="{}"),
            "not a recipient and a serialized message",
        ),
        (
            _body(__asgi_serializer__="json", __asgi_serialized__=b"{}", type="hush"),
            "not a recipient and a serialized message",
        ),
        (_body(__asgi_serialized__=b"{}"), "by the serializer msgpack, while it is json here"),
        (
            _body(__asgi_serializer__=1, __asgi_serialized__=b"{}"),
            "a serializer without a",
        ),
        (
            _body(__asgi_serializer__="hush\n", __asgi_serialized__=b""),
            "a serializer without a",
        ),
        (
            _body(__asgi_serializer__="json", __asgi_serialized__=b"hush"),
            "JSONDecodeError was raised by deserialize(), of the serializer json",
        ),
        (
            _body(__asgi_serializer__="json", __asgi_serialized__=b'["hush"]'),
            "deserialize() returned a list, not a dict, of the serializer json",
        ),
        (
            _body(__asgi_serializer__="json", __asgi_serialized__=100_000 * b"["),
            "RecursionError was raised by deserialize(), of the serializer json",
        ),
    ],
    ids=range(9),
)
def test_malformed_bodies(body: bytes, problem: str) -> None:
    with pytest.raises(MalformedBody) as caught:
        JSON.decode(body)
    assert problem in str(caught.value)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize("by", [JSON, SECRET_JSON, OWN], ids=["plain", "encrypted", "own"])
@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("original", [{"type": "x"}, {"type": "x", "list": [{"a": 1}]}])
def test_each_member_gets_a_copy_of_its_own(
    by: MessageCodec, original: dict[str, Any], compacted: bool
) -> None:
    for envelope in (
        by.decode(by.encode_for_group("g", original)),
        by.decode(by.encode_for_channel("a!b", original)),
    ):
        if compacted:
            envelope.compact()
        copies = [envelope.message() for _ in range(3 if envelope.group else 1)]
        assert all(copy == original for copy in copies)
        copies[0].setdefault("list", []).append("changed")
        copies[0]["more"] = 1
        assert copies[1:] == len(copies[1:]) * [original]


# A project's own class


def test_a_class_of_the_projects_takes_what_it_takes() -> None:
    message = {"type": "x", "at": datetime.date(2026, 1, 2), 5: {1, 2}}
    assert there_and_back(message, OWN) == message
    assert there_and_back(message, codec_with(Pickled, ("key",))) == message


def test_its_exceptions_are_the_senders() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        OWN.encode_for_group("g", {"type": lambda: None})


def test_it_must_make_bytes() -> None:
    class Text(Pickled):
        def serialize(self, message: dict[str, Any]) -> Any:
            return json.dumps(message)

    with pytest.raises(TypeError, match=r"the serializer .*Text must return bytes, not str"):
        codec_with(Text).encode_for_group("g", {"type": "x"})


class _Moody(Pickled):
    """Reads each message once."""

    def __init__(self) -> None:
        self.has_read: set[bytes] = set()

    def deserialize(self, packed: bytes) -> Any:
        if packed in self.has_read:
            raise RuntimeError("hush")
        self.has_read.add(packed)
        return super().deserialize(packed)


@pytest.mark.parametrize("compacted", [False, True])
def test_a_message_that_cant_be_read_again_is_told_in_words(compacted: bool) -> None:
    by = codec_with(_Moody)
    envelope = by.decode(by.encode_for_group("g", {"type": "x", "list": []}))
    if compacted:
        envelope.compact()
    else:
        assert envelope.message() == {"type": "x", "list": []}
    with pytest.raises(UnreadableMessage, match="A message can't be read again") as caught:
        envelope.message()
    assert "RuntimeError was raised by deserialize(), of the serializer" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


# Settings


def test_a_dotted_path_is_imported_at_the_first_use(hooks_module: Path) -> None:
    layer = RabbitmqChannelLayer(serializer="hooks_of_a_test.sub.Serializer")
    assert "hooks_of_a_test.sub" not in sys.modules
    hooks_module.write_text(
        "class Serializer:\n"
        "    def serialize(self, message): return repr(message).encode()\n"
        "    def deserialize(self, packed): return eval(packed)\n"
    )
    codec = layer._settings.codec
    assert there_and_back({"type": "x"}, codec) == {"type": "x"}
    assert b"hooks_of_a_test.sub.Serializer" in codec.encode_for_group("g", {"type": "x"})


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("", "AttributeError: module 'hooks_of_a_test.sub' has no attribute 'Serializer'"),
        ("def Serializer(): pass", "ValueError: serializer must be "),
        (
            "class Serializer:\n    def serialize(self, message): return b''\n",
            "ValueError: serializer: the class Serializer has no deserialize()",
        ),
    ],
    ids=range(3),
)
async def test_a_path_that_leads_nowhere(hooks_module: Path, source: str, problem: str) -> None:
    hooks_module.write_text(source)
    layer = RabbitmqChannelLayer(serializer="hooks_of_a_test.sub.Serializer")
    for call in (layer.send("a!b", {"type": "x"}), layer.new_channel(), layer.receive("a!b")):
        with pytest.raises(InvalidChannelLayerError) as caught:
            await call
        assert f"serializer: cannot use 'hooks_of_a_test.sub.Serializer': {problem}" in str(
            caught.value
        )


def test_a_class_that_wants_arguments() -> None:
    class Demanding(Pickled):
        def __init__(self, key: str) -> None: ...

    layer = RabbitmqChannelLayer(serializer=Demanding)
    with pytest.raises(InvalidChannelLayerError, match="serializer: cannot make a "):
        _ = layer._settings.codec


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("yaml", 'must be "msgpack", "json", or a class with serialize() and deserialize(), or'),
        ("", "must be"),
        (None, "must be"),
        (Pickled(), "the dotted path of one, not Pickled"),
        (dict, "the class dict has no serialize()"),
        ("no_such_module.Serializer", "there is no module 'no_such_module'"),
    ],
    ids=range(6),
)
def test_bad_values_are_told_when_the_layer_is_made(value: Any, problem: str) -> None:
    with pytest.raises(InvalidChannelLayerError) as caught:
        RabbitmqChannelLayer(serializer=value)
    assert "serializer" in str(caught.value)
    assert problem in str(caught.value)


def test_a_layer_with_a_class_can_be_pickled() -> None:
    again = pickle.loads(pickle.dumps(RabbitmqChannelLayer(serializer=Pickled)))
    assert again._settings.serializer is Pickled

    class Local(Pickled):
        pass

    with pytest.raises(
        pickle.PicklingError, match=r"option serializer .*; give the dotted path of the class"
    ):
        pickle.dumps(RabbitmqChannelLayer(serializer=Local))


def test_the_default_is_msgpack() -> None:
    assert Settings.from_config({}).serializer == "msgpack"
