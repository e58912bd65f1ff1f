"""Messages that msgpack didn't take as they are: a plain copy, or the place of what can't be sent.

Django's code has values that stand for others: a ``SimpleLazyObject``, a text that is translated
when it is used, the ``memoryview`` of a ``BinaryField``. What a receiver wants is what they stand
for, so they are replaced by it.

*Which ones stand for others.* A proxy reports the class of its object as ``__class__``, so
``isinstance()`` takes it for that, and msgpack's C code, which goes by the true type, does not.
Django's lazy texts report their own class; they are known by their base class, if Django is there
at all. Here everything goes by the true type.

*How they are asked.* By an operation whose result is the true thing, whatever forwards it: a slice,
``__mul__``, ``copy``. (``str()`` has an answer for everything, also for a test's ``Mock`` that only
says that it is a ``str``.) The result is looked at. Asking runs code of others, which may raise
anything, for instance because it would ask a database on an event loop. The error names the place
and the exception's class; its text may hold what must not be in a log.

Nothing here is on the path of a message that msgpack takes. No recursion: the caller may have used
up most of the stack.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import msgpack

from ._names import is_encodable

# Containers within each other, the message itself included. msgpack's own limit
# differs between its releases (511, 1024, less without its C code), and sender
# and receiver needn't have the same one.
MAX_DEPTH = 256
MAX_INT = 2**63 - 1
_MIN_INT = -(2**63)

_T = TypeVar("_T")

_ALLOWED = "a message can hold bytes, str, int, float, bool, None, list, tuple and dict"

# How to ask a proxy for its object, by the class that it reports; the first that fits.
_ASK: dict[type, Callable[[Any], object]] = {
    bool: lambda proxy: proxy.__and__(True),
    int: lambda proxy: proxy.__mul__(1),
    float: lambda proxy: proxy.__mul__(1),
    str: lambda proxy: proxy[:],
    bytes: lambda proxy: proxy[:],
    bytearray: lambda proxy: proxy[:],
    memoryview: lambda proxy: proxy[:],
    list: lambda proxy: proxy[:],
    tuple: lambda proxy: proxy[:],
    dict: lambda proxy: proxy.copy(),
    type(None): lambda proxy: None,
}


class _Level(NamedTuple):
    """A container of the message, half copied."""

    # To find out whether it contains itself: the container, or its proxy.
    original: object
    # Path, key and value of what is still to come; a list has no keys.
    rest: Iterator[tuple[str, str, object]]
    copy: dict[str, Any] | list[Any]

    def put(self, key: str, value: object) -> None:
        if isinstance(self.copy, dict):
            self.copy[key] = value
        else:
            self.copy.append(value)


def plain_copy(message: object) -> dict[str, Any]:
    """Copy a message, with what its proxies stand for; tuples become lists, views bytes.

    Raises ``TypeError``, which names the place, for what a message can't hold.
    """
    content = _resolve("message", message)
    if not _is_a(content, dict):
        raise TypeError(f"message must be a dict, not {_type_name(message)}")
    copy: dict[str, Any] = {}
    levels = [_Level(message, _children("message", content), copy)]
    while levels:
        child = next(levels[-1].rest, None)
        if child is None:
            levels.pop()
            continue
        path, key, value = child
        content = _resolve(path, value)
        if not is_container(content):
            levels[-1].put(key, _check_atom(path, content))
        elif any(level.original is value for level in levels):
            raise TypeError(f"{_shorten(path)} contains itself")
        elif len(levels) >= MAX_DEPTH:
            raise TypeError(f"{_shorten(path)} is nested deeper than {MAX_DEPTH} levels")
        else:
            deeper = _Level(value, _children(path, content), {} if _is_a(content, dict) else [])
            levels[-1].put(key, deeper.copy)
            levels.append(deeper)
    return copy


def is_container(value: object) -> bool:
    """Whether it is a container by its true type."""
    # msgpack's ExtType is a tuple, but one that it packs as something else.
    return _is_a(value, dict, list, tuple) and not _is_a(value, msgpack.ExtType)


def _resolve(path: str, value: Any) -> Any:
    """What a value stands for; most often itself."""
    if _is_a(value, bytearray, memoryview):
        return _ask(path, value, lambda view: memoryview(view).tobytes())
    if _is_a(value, *_ASK):
        return value
    reported = _ask(path, value, lambda proxy: proxy.__class__)
    if _is_lazy_text(type(value)) or _is_lazy_text(reported):
        return _ask(path, value, str)
    if reported is type(value):
        return value
    for cls, ask in _ASK.items():
        if _is_class(reported, cls):
            content = _ask(path, value, ask)
            if _is_a(content, cls):
                return _resolve(path, content)
    raise TypeError(
        f"{_shorten(path)} is of type {_type_name(value)} and stands for "
        f"{getattr(reported, '__qualname__', 'something else')}; {_ALLOWED}"
    )


def _ask(path: str, value: object, how: Callable[[Any], _T]) -> _T:
    """Run what is the project's code, perhaps. Nothing is chained: it may hold values."""
    try:
        return how(value)
    except Exception as exc:
        problem = type(exc).__name__
    raise TypeError(
        f"{_shorten(path)} is of type {_type_name(value)}, and {problem} was raised when it was "
        "asked what it stands for"
    )


def _is_lazy_text(cls: object) -> bool:
    """Whether it is the class of a lazy text of Django's, by ``gettext_lazy`` for instance."""
    # What nobody has imported nobody has made an object of.
    promise = getattr(sys.modules.get("django.utils.functional"), "Promise", None)
    return promise is not None and _is_class(cls, promise) and hasattr(cls, "encode")


def _children(path: str, container: Any) -> Iterator[tuple[str, str, object]]:
    """Path, key and value of each thing in a container; raises TypeError at a bad key."""
    if not _is_a(container, dict):
        for index, value in enumerate(_ask(path, container, list)):
            yield f"{path}[{index}]", "", value
        return
    keys: set[str] = set()
    for original, value in _ask(path, container, _items):
        key = _resolve(f"a key of {path}", original)
        if not _is_a(key, str):
            raise TypeError(
                f"{_shorten(path)} has a key of type {_type_name(original)}; keys must be str"
            )
        short_key = _shorten(key, 40)
        quoted_key = json.dumps(short_key, ensure_ascii=not short_key.isprintable())
        if not is_encodable(key):
            raise TypeError(f"{_shorten(path)} has a key, {quoted_key}, with a lone surrogate")
        if key in keys:
            raise TypeError(f"{_shorten(path)} has the key {quoted_key} twice")
        keys.add(key)
        yield f"{path}[{quoted_key}]", key, value


def _items(mapping: Any) -> list[tuple[object, object]]:
    return [(key, value) for key, value in mapping.items()]


def _check_atom(path: str, value: Any) -> object:
    """Return a value that isn't a container; raise TypeError for what can't be sent."""
    problem = f"is of type {_type_name(value)}; {_ALLOWED}"
    if _is_a(value, str):
        problem = "" if is_encodable(value) else "is a str with a lone surrogate"
    elif _is_a(value, int) and not _is_a(value, bool):
        original, value = value, int.__index__(value)  # A subclass may compare as it likes.
        problem = ""
        if not _MIN_INT <= value <= MAX_INT:
            problem = f"is of type {_type_name(original)} and beyond 64 bits (signed)"
    elif value is None or _is_a(value, bool, bytes, float):
        problem = ""
    if problem:
        raise TypeError(f"{_shorten(path)} {problem}")
    return value


def _is_a(value: object, *classes: type) -> bool:
    """``isinstance()`` without belief in what the value reports."""
    return issubclass(type(value), classes)


def _is_class(cls: Any, base: type) -> bool:
    return _is_a(cls, type) and issubclass(cls, base)


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def _type_name(value: object) -> str:
    cls = type(value)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"
