"""Copy messages that msgpack refused: make them plain, or name the value that can't be sent.

Django's code has values that stand for other values: a ``SimpleLazyObject``, a text that is
translated when it is used, the ``memoryview`` of a ``BinaryField``. The receiver needs the other
value, so this module puts that in place of the proxy.

*How a proxy is recognised.* A proxy reports the class of its object as ``__class__``. So
``isinstance()`` accepts it as that class. msgpack's C code looks at the true type and refuses it.
Django's lazy texts report their own class; they are recognised by their base class, if Django has
been imported. All other checks in this module look at the true type.

*How a proxy is asked for its object.* By an operation whose result is the object itself, whichever
way the proxy forwards it: a slice, ``__mul__``, ``copy``. ``str()`` wouldn't do, because it gives a
text for every object, also for a test's ``Mock`` that only claims to be a ``str``. The result is
checked, too. The operation runs code of the project, which may raise any exception, for instance
because it would query a database on an event loop. The error names the place and the exception's
class, but not the exception's text, which may hold a value that must not be in a log.

A message that msgpack packs never comes here. The functions use no recursion, since the caller may
have used up most of the stack.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import msgpack

from ._names import is_encodable

# How many containers may be nested, the message itself included. msgpack's own
# limit differs between its releases (511, 1024, less without its C code), and
# sender and receiver may have different releases.
MAX_DEPTH = 256
MAX_INT = 2**63 - 1
_MIN_INT = -(2**63)

_T = TypeVar("_T")

_ALLOWED = "a message can hold bytes, str, int, float, bool, None, list, tuple and dict"

# How to ask a proxy for its object, by the class that it reports. The first match counts.
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
    """A container of the message that is being copied."""

    # The container, or its proxy: shows whether a container contains itself.
    original: object
    # Path, key and value of each item that isn't copied yet. A list has no keys.
    rest: Iterator[tuple[str, str, object]]
    copy: dict[str, Any] | list[Any]

    def put(self, key: str, value: object) -> None:
        if isinstance(self.copy, dict):
            self.copy[key] = value
        else:
            self.copy.append(value)


def plain_copy(message: object, name: str = "message") -> dict[str, Any]:
    """Return a copy of a message without proxies; tuples become lists, and views become bytes.

    Raises ``TypeError`` for a value that a message can't hold, and names its place; ``name`` is
    what it calls the message.
    """
    content = resolve(name, message)
    if not _is_a(content, dict):
        raise TypeError(f"{name} must be a dict, not {type_name(message)}")
    copy: dict[str, Any] = {}
    levels = [_Level(message, _children(name, content), copy)]
    while levels:
        child = next(levels[-1].rest, None)
        if child is None:
            levels.pop()
            continue
        path, key, value = child
        content = resolve(path, value)
        if not is_container(content):
            levels[-1].put(key, _check_atom(path, content))
        elif any(level.original is value for level in levels):
            raise TypeError(f"{shorten(path)} contains itself")
        elif len(levels) >= MAX_DEPTH:
            raise TypeError(f"{shorten(path)} is nested deeper than {MAX_DEPTH} levels")
        else:
            deeper = _Level(value, _children(path, content), {} if _is_a(content, dict) else [])
            levels[-1].put(key, deeper.copy)
            levels.append(deeper)
    return copy


def is_container(value: object) -> bool:
    """Whether ``value`` is a container by its true type."""
    # msgpack's ExtType is a tuple, but msgpack doesn't pack it as one.
    return _is_a(value, dict, list, tuple) and not _is_a(value, msgpack.ExtType)


def resolve(path: str, value: Any) -> Any:
    """Return the value that ``value`` stands for, most often itself."""
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
                return resolve(path, content)
    raise TypeError(
        f"{shorten(path)} is of type {type_name(value)} and stands for "
        f"{getattr(reported, '__qualname__', 'something else')}; {_ALLOWED}"
    )


def _ask(path: str, value: object, how: Callable[[Any], _T]) -> _T:
    """Return ``how(value)``, which may run code of the project.

    Raises TypeError, which chains no exception: that could hold values.
    """
    try:
        return how(value)
    except Exception as exc:
        problem = type(exc).__name__
    raise TypeError(
        f"{shorten(path)} is of type {type_name(value)}, and {problem} was raised when it was "
        "asked what it stands for"
    )


def _is_lazy_text(cls: object) -> bool:
    """Whether ``cls`` is the class of Django's lazy texts, such as ``gettext_lazy`` returns."""
    # If the module hasn't been imported, no such object exists.
    promise = getattr(sys.modules.get("django.utils.functional"), "Promise", None)
    return promise is not None and _is_class(cls, promise) and hasattr(cls, "encode")


def _children(path: str, container: Any) -> Iterator[tuple[str, str, object]]:
    """Yield path, key and value of each item in a container; raise TypeError at a bad key."""
    if not _is_a(container, dict):
        for index, value in enumerate(_ask(path, container, list)):
            yield f"{path}[{index}]", "", value
        return
    keys: set[str] = set()
    for original, value in _ask(path, container, _items):
        key = resolve(f"a key of {path}", original)
        if not _is_a(key, str):
            raise TypeError(
                f"{shorten(path)} has a key of type {type_name(original)}; keys must be str"
            )
        short_key = shorten(key, 40)
        quoted_key = json.dumps(short_key, ensure_ascii=not short_key.isprintable())
        if not is_encodable(key):
            raise TypeError(f"{shorten(path)} has a key, {quoted_key}, with a lone surrogate")
        if key in keys:
            raise TypeError(f"{shorten(path)} has the key {quoted_key} twice")
        keys.add(key)
        yield f"{path}[{quoted_key}]", key, value


def _items(mapping: Any) -> list[tuple[object, object]]:
    return [(key, value) for key, value in mapping.items()]


def _check_atom(path: str, value: Any) -> object:
    """Return a value that isn't a container; raise TypeError if it can't be sent."""
    problem = f"is of type {type_name(value)}; {_ALLOWED}"
    if _is_a(value, str):
        problem = "" if is_encodable(value) else "is a str with a lone surrogate"
    elif _is_a(value, int) and not _is_a(value, bool):
        original, value = value, int.__index__(value)  # A subclass may compare in its own way.
        problem = ""
        if not _MIN_INT <= value <= MAX_INT:
            problem = f"is of type {type_name(original)} and beyond 64 bits (signed)"
    elif value is None or _is_a(value, bool, bytes, float):
        problem = ""
    if problem:
        raise TypeError(f"{shorten(path)} {problem}")
    return value


def _is_a(value: object, *classes: type) -> bool:
    """``isinstance()`` by the true type, not by the class that ``value`` reports."""
    return issubclass(type(value), classes)


def _is_class(cls: Any, base: type) -> bool:
    return _is_a(cls, type) and issubclass(cls, base)


def shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def type_name(value: object) -> str:
    cls = type(value)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"
