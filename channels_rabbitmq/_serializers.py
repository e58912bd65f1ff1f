"""The option ``serializer``: other ways than msgpack to make bytes of a message.

``"json"`` is JSON as Django's encoder writes it. A project may name a class of its own, as for
``channels_redis``. The codec puts the serializer's bytes and name into a body, in place of the
message. So a receiver with another serializer can say what is wrong.

No error contains a value of a message, nor does an error that it chains.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from channels.exceptions import InvalidChannelLayerError

from ._functions import import_function
from ._names import is_encodable
from ._plain_messages import MAX_DEPTH, resolve, shorten, type_name

MSGPACK = "msgpack"
JSON = "json"

_METHODS = ("serialize", "deserialize")
_JSON_KEYS = (str, int, float, type(None))


@dataclass(frozen=True)
class Serializer:
    """One way to make bytes of a message. Any thread may use it.

    A project's class may raise any exception.
    """

    name: str  # in bodies and errors
    serialize: Callable[[Any], object]
    deserialize: Callable[[bytes], object]


def check_serializer(option: str, value: object) -> type[Any]:
    """Return ``value`` if it is a class of serializers; else raise ValueError."""
    if not inspect.isclass(value):
        raise ValueError(
            f'{option} must be "{MSGPACK}", "{JSON}", or a class with serialize() and '
            f"deserialize(), or the dotted path of one, not {type(value).__qualname__}"
        )
    missing = [method for method in _METHODS if not callable(getattr(value, method, None))]
    if missing:
        raise ValueError(f"{option}: the class {value.__qualname__} has no {missing[0]}()")
    return value


def load_serializer(value: type[Any] | str) -> Serializer | None:
    """Return what the option asks for; None for msgpack.

    Raises InvalidChannelLayerError if a class can't be imported, or can't be called without
    arguments.
    """
    if value == MSGPACK:
        return None
    if value == JSON:
        coder = _Json()
        return Serializer(JSON, coder.serialize, coder.deserialize)
    cls = value if isinstance(value, type) else import_function("serializer", value, _is_class)
    name = f"{cls.__module__}.{cls.__qualname__}"
    try:
        made = cls()
    except Exception as err:  # The class may raise any exception.
        raise InvalidChannelLayerError(
            f"serializer: cannot make a {name}, without arguments: {type(err).__name__}: {err}"
        ) from err
    return Serializer(name, made.serialize, made.deserialize)


def _is_class(option: str, value: object) -> type[Any]:
    return check_serializer(option, value)


class _Json:
    """JSON as Django writes it: dates, UUIDs, Decimals and lazy texts as text, keys as text.

    Django's proxies are written as the values that they stand for, as with msgpack.
    """

    def __init__(self) -> None:
        # Here, because it loads a part of Django that nothing else needs.
        from django.core.serializers.json import DjangoJSONEncoder

        class Encoder(DjangoJSONEncoder):  # type: ignore[misc]  # Django has no types
            def default(self, value: Any) -> Any:
                try:
                    return super().default(value)
                except TypeError:
                    content = resolve("a value", value)
                if content is value or isinstance(content, bytes):
                    raise TypeError("no JSON")
                return content

        self._encode: Callable[[object], str] = Encoder(
            ensure_ascii=False, separators=(",", ":")
        ).encode

    def serialize(self, message: dict[str, Any]) -> bytes:
        """Return the bytes. Raises TypeError, which names the place of what JSON can't hold."""
        packed = self._try(message)
        if packed is None:
            raise TypeError(self._describe(message))
        return packed

    def _try(self, value: object) -> bytes | None:
        try:
            return self._encode(value).encode()
        except MemoryError:
            raise
        except Exception:  # Proxies run code of the project.
            return None

    @staticmethod
    def deserialize(packed: bytes) -> object:
        return json.loads(packed)

    def _describe(self, message: object) -> str:
        """Say where the value is that can't be written, and of which type, but not the value."""
        path, value = "message", message
        for _ in range(MAX_DEPTH):
            problem = _bad_key(value)
            if problem:
                return f"{shorten(path)} {problem}"
            refused = (child for child in _children(path, value) if self._try(child[1]) is None)
            deeper = next(refused, None)
            if deeper is None:
                if isinstance(value, str):
                    return f"{shorten(path)} is a str with a lone surrogate"
                return f"{shorten(path)} is of type {type_name(value)}, which JSON can't hold"
            path, value = deeper
        return f"{shorten(path)} contains itself, or is nested deeper than {MAX_DEPTH} levels"


def _bad_key(value: object) -> str:
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, _JSON_KEYS):
            return f"has a key of type {type_name(key)}; JSON makes text of str, int and float only"
        if isinstance(key, str) and not is_encodable(key):
            return "has a key with a lone surrogate"
    return ""


def _children(path: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield f"{path}[{json.dumps(shorten(str(key), 40))}]", child
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield f"{path}[{index}]", child
