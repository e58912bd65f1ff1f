"""Values that stand for others, as Django's code has them, and what isn't what it says it is."""

from __future__ import annotations

import array
import copy
import enum
import math
import subprocess
import sys
import types
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock, Mock

import django
import msgpack.fallback
import pytest
from django.conf import settings
from django.utils import translation
from django.utils.functional import SimpleLazyObject, lazy, lazystr
from django.utils.safestring import SafeString, mark_safe
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy

from channels_rabbitmq import _codec
from tests.support.codecs import codec, encoding_error, same, secret_codec, there_and_back

if not settings.configured:
    settings.configure()
django.setup()  # translations need it


class Pretender:
    """Reports another class; asked, it has what it is given, or nothing at all."""

    def __init__(self, cls: Any, **methods: Callable[..., object]) -> None:
        self._cls = cls
        self.__dict__.update(methods)

    @property
    def __class__(self) -> Any:
        return self._cls() if isinstance(self._cls, types.FunctionType) else self._cls

    __hash__ = object.__hash__


class Forwarding:
    """A proxy in the manner of other packages: forwards each attribute, and what is looked up."""

    def __init__(self, wrapped: Any) -> None:
        object.__setattr__(self, "_wrapped", wrapped)

    @property
    def __class__(self) -> Any:
        return type(self._wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __getitem__(self, key: Any) -> Any:
        return self._wrapped[key]

    def __eq__(self, other: object) -> bool:
        return bool(self._wrapped == other)

    def __hash__(self) -> int:
        return hash(self._wrapped)


class User:
    pass


class Items(list[Any]):
    pass


class Level(enum.IntEnum):
    HIGH = 3


def fail() -> Any:
    raise LookupError("hush")


ITEMS = Items(["x"])

STANDING_FOR = [
    "text", "", SafeString("safe"), b"bytes", b"", 5, -(2**63), Level.HIGH, True, False, 1.5, -0.0,
    math.nan, None, [1, [2]], (1, "a"), {"a": {"b": b"c"}}, OrderedDict(a=1), Items([1]), [], {},
]  # fmt: skip


def plain(value: Any) -> Any:
    """As a receiver gets it."""
    return there_and_back({"v": value})["v"]


@pytest.mark.parametrize("proxy", [lambda value: SimpleLazyObject(lambda: value), Forwarding])
@pytest.mark.parametrize("value", STANDING_FOR, ids=repr)
@pytest.mark.parametrize("packer", [msgpack.Packer, msgpack.fallback.Packer], ids=["c", "python"])
def test_proxies_arrive_as_what_they_stand_for(
    value: Any, proxy: Callable[[Any], Any], packer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(value)
    monkeypatch.setattr(_codec.msgpack, "Packer", packer)
    for by in (codec, secret_codec):
        for message, arrived in (
            ({"v": proxy(value)}, {"v": expected}),
            ({"v": [{"w": (0, proxy(value))}]}, {"v": [{"w": [0, expected]}]}),
            ({"v": proxy({"w": proxy([proxy(value)])})}, {"v": {"w": [expected]}}),
        ):
            assert same(there_and_back(message, by), arrived)


def test_proxies_as_keys_and_as_the_message() -> None:
    message: Any = SimpleLazyObject(
        lambda: {"type": "x", SimpleLazyObject(lambda: "a"): {Forwarding("b"): gettext_lazy("c")}}
    )
    assert there_and_back(message) == {"type": "x", "a": {"b": "c"}}
    assert there_and_back(message, secret_codec) == {"type": "x", "a": {"b": "c"}}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (gettext_lazy("Sunday"), "Sonntag"),
        (format_lazy("{}: {}", gettext_lazy("Sunday"), 1), "Sonntag: 1"),
        (lazystr(5), "5"),
        (lazy(lambda: mark_safe("<b>"), str)(), "<b>"),
        (SimpleLazyObject(lambda: gettext_lazy("Sunday")), "Sonntag"),
    ],
    ids=["gettext_lazy", "format_lazy", "lazystr", "mark_safe", "both"],
)
def test_lazy_texts_arrive_as_texts(value: Any, text: str) -> None:
    with translation.override("de"):
        assert same(there_and_back({"v": value}), {"v": text})
        assert same(there_and_back({"v": [{value: value}]}), {"v": [{text: text}]})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (bytearray(b"a\0"), b"a\0"),
        (memoryview(b"a\0"), b"a\0"),
        (memoryview(b"abcd")[::2], b"ac"),
        (memoryview(bytearray(b"ab")), b"ab"),
        (memoryview(array.array("H", [1, 2])), array.array("H", [1, 2]).tobytes()),
        (memoryview(b"abcd").cast("B", (2, 2)), b"abcd"),
        (SimpleLazyObject(lambda: memoryview(b"ab")), b"ab"),
        (SimpleLazyObject(lambda: bytearray(b"ab")), b"ab"),
        (70_000 * bytearray(b"a"), 70_000 * b"a"),
    ],
    ids=lambda value: "",
)
def test_binary_views_are_bytes(value: Any, expected: bytes) -> None:
    for by in (codec, secret_codec):
        assert same(there_and_back({"v": value}, by), {"v": expected})
        assert same(there_and_back({"v": [(value,)]}, by), {"v": [[expected]]})


def test_the_senders_message_stays_as_it_was() -> None:
    inner = [bytearray(b"a"), (1, 2)]
    message = {"v": inner}
    assert there_and_back(message) == {"v": [b"a", [1, 2]]}
    assert message["v"] is inner
    assert same(inner, [bytearray(b"a"), (1, 2)])


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            SimpleLazyObject(User),
            "is of type django.utils.functional.SimpleLazyObject and stands for User; a message",
        ),
        (SimpleLazyObject(lambda: {1, 2}), "SimpleLazyObject and stands for set; a message can"),
        (SimpleLazyObject(fail), "SimpleLazyObject, and LookupError was raised when it was asked"),
        (lazy(fail, str)(), "__proxy__, and LookupError was raised when it was asked"),
        (lazy(lambda: 5, int)(), "__proxy__; a message can hold"),
        (Pretender(fail), "Pretender, and LookupError was raised when it was asked"),
        (Pretender(str), "Pretender, and TypeError was raised when it was asked"),
        (Pretender(int), "Pretender, and AttributeError was raised when it was asked"),
        (Pretender(int, __mul__=lambda n: "hush"), "Pretender and stands for int"),
        (Pretender(dict, copy=lambda: [("hush", 1)]), "Pretender and stands for dict"),
        (Pretender(list, append=None), "Pretender, and TypeError was raised when it was asked"),
        (Pretender("hush"), "Pretender and stands for something else"),
        (Mock(spec=str), "unittest.mock.Mock, and TypeError was raised"),
        (MagicMock(spec=str), "unittest.mock.MagicMock and stands for str"),
        (MagicMock(spec=dict), "unittest.mock.MagicMock and stands for dict"),
        (UserDict(hush=1), "is of type collections.UserDict; a message can hold"),
        (types.MappingProxyType({"hush": 1}), "is of type mappingproxy; a message can hold"),
        (SimpleLazyObject(lambda: 2**63), "is of type int and beyond 64 bits"),
        (SimpleLazyObject(lambda: "hush\ud800"), "is a str with a lone surrogate"),
        (SimpleLazyObject(lambda: msgpack.Timestamp(5, 6)), "stands for Timestamp"),
        (weakref.proxy(ITEMS, None), None),
    ],
    ids=lambda value: "",
)
def test_what_can_not_be_resolved_names_its_place(value: Any, problem: str | None) -> None:
    if problem is None:  # A weak reference's proxy is like the others.
        assert plain(value) == ["x"]
        return
    text = encoding_error({"a": [{"b": value}]})
    assert text.startswith('message["a"][0]["b"] ')
    assert problem in text
    assert "hush" not in text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (SimpleLazyObject(lambda: ["hush"]), "message must be a dict, not django.utils.functional"),
        (
            SimpleLazyObject(fail),
            "message is of type django.utils.functional.SimpleLazyObject, and",
        ),
        ({"a": {SimpleLazyObject(lambda: 5): "hush"}}, 'message["a"] has a key of type django.'),
        ({"a": {Pretender(fail): "hush"}}, f'a key of message["a"] is of type {__name__}.'),
        ({"a": {Pretender(str): "hush"}}, f'a key of message["a"] is of type {__name__}.'),
        (
            {"a": {"b": 1, Pretender(str, __getitem__=None): 2}},
            f'a key of message["a"] is of type {__name__}.Pretender',
        ),
        (
            {SimpleLazyObject(lambda: "__asgi_group__"): "hush"},
            "message has a reserved key: __asgi_group__",
        ),
    ],
    ids=lambda value: "",
)
def test_messages_and_keys_that_can_not_be_resolved(message: Any, text: str) -> None:
    assert encoding_error(message).startswith(text)
    assert "hush" not in encoding_error(message)


class SecretKey:
    """Stands for a text, with a hash of its own: so a dict can't see which."""

    __class__ = str  # type: ignore[assignment]  # a proxy that pretends

    def __init__(self, text: str) -> None:
        self._text = text

    def __getitem__(self, index: Any) -> str:
        return self._text[index]

    __hash__ = object.__hash__


def test_keys_that_a_dict_could_not_compare() -> None:
    assert there_and_back({"v": {SecretKey("a"): 1}}) == {"v": {"a": 1}}
    assert (
        encoding_error({"v": {"a": 1, SecretKey("a"): 2}}) == 'message["v"] has the key "a" twice'
    )
    text = encoding_error({SecretKey("__asgi_channel__"): 1})
    assert text == "message has a reserved key: __asgi_channel__"


def test_a_proxy_that_contains_itself() -> None:
    inner: list[Any] = []
    proxy = SimpleLazyObject(lambda: inner)
    inner += [proxy, proxy]
    assert encoding_error({"a": proxy}) == 'message["a"][0] contains itself'


def test_a_view_that_was_released() -> None:
    view = memoryview(b"hush")
    view.release()
    assert encoding_error({"a": view}).startswith(
        'message["a"] is of type memoryview, and ValueError'
    )


def test_a_dict_that_can_not_be_read() -> None:
    class Broken(dict[str, Any]):
        def items(self) -> Any:
            raise LookupError("hush")

    class Strange(dict[str, Any]):
        def items(self) -> Any:
            return [("hush", 1, 2)]

    for broken, problem in ((Broken(b=1), "LookupError"), (Strange(b=1), "ValueError")):
        text = encoding_error({"a": broken})
        assert text.startswith(f'message["a"] is of type {__name__}.')
        assert f"{problem} was raised" in text


def test_a_number_that_can_not_be_compared() -> None:
    class Incomparable(int):
        def __gt__(self, other: object) -> bool:
            raise LookupError("hush")

        __lt__ = __ge__ = __le__ = __gt__

    assert same(plain([Incomparable(5)]), [5])
    text = encoding_error({"a": Incomparable(2**63)})
    assert text.startswith(f'message["a"] is of type {__name__}.')
    assert text.endswith("beyond 64 bits (signed)")


def test_a_proxy_in_a_copy_of_a_message_is_asked_once_for_each_message() -> None:
    asked: list[int] = []

    def ask() -> str:
        asked.append(1)
        return "x"

    message = {"v": SimpleLazyObject(ask)}
    assert there_and_back(copy.copy(message)) == {"v": "x"}
    assert asked == [1]


def test_django_is_not_imported_for_it() -> None:
    program = (
        "import sys; from channels_rabbitmq._codec import MessageCodec as Codec\n"
        "for name in list(sys.modules):\n"
        "    if name.startswith('django'): del sys.modules[name]\n"
        "body = Codec(max_message_size=100).encode_for_group('g', {'v': bytearray(b'a')})\n"
        "assert not [name for name in sys.modules if name.startswith('django')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
