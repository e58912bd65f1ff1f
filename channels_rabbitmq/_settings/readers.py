"""Functions that read the value of one option, or raise ``ValueError`` that names the option.

Each gets the option's name and the value as the project wrote it. No error quotes a value that may
be secret: see ``settings.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import ssl
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from .._amqp.url import FORM, BrokerUrl
from .._names import is_encodable
from .._serializers import JSON, MSGPACK, check_serializer
from .hosts import read_hosts
from .mistakes import read_each

_LONGEST_EXCHANGE_NAME = 127

# channels_redis has other values under the names of the hooks.
NO_MESSAGE_TYPE = "in channels_redis it is the type of a message, here a function that may send one"

# Gets the id of a LoopLayer and a reason. If it returns an awaitable, that is awaited.
HookFunction = Callable[[str, str], object]
# Returns a URL or a list of URLs, as the option ``host`` may be, or an awaitable of these.
HostFunction = Callable[[], object]

_DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")

_T = TypeVar("_T")


def read_host(name: str, value: object) -> tuple[BrokerUrl, ...] | HostFunction | str:
    if isinstance(value, str) and _DOTTED_PATH.fullmatch(value):
        if not _has_module(value):
            raise ValueError(
                f"{name}: the URL must start with amqp:// or amqps://, such as {FORM}; and for the "
                f"dotted path of a function there is no module {value.partition('.')[0]!r}"
            )
        return value
    return check_host_function(name, value) if callable(value) else read_hosts(name, value)


def check_host_function(name: str, value: object) -> HostFunction:
    """Return ``value`` if it can be called without arguments; else raise ValueError."""
    return _check_function(name, value, (), "without arguments")


def read_ssl_context(name: str, value: object) -> ssl.SSLContext | None:
    if value is not None and not isinstance(value, ssl.SSLContext):
        raise ValueError(f"{name} must be None or an ssl.SSLContext, not {type_name(value)}")
    return value


def seconds(
    shortest: float, longest: float, *, or_zero: bool = False
) -> Callable[[str, object], float]:
    """Make a reader of seconds. ``shortest`` itself is allowed, but 0 only with ``or_zero``."""
    first = f"from {shortest:g}" if shortest or or_zero else "above 0"
    limits = f"{first} up to {longest:.0f}"

    def read(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number of seconds {limits}, not {type_name(value)}")
        # The comparison is False for NaN, too.
        if not (shortest <= value <= longest and (value or or_zero)):
            raise ValueError(f"{name} must be a number of seconds {limits}, not {_show(value)}")
        return float(value)

    return read


def read_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {type_name(value)}")
    return value


def count(largest: int | None = None) -> Callable[[str, object], int]:
    limits = "of at least 1" if largest is None else f"from 1 to {largest}"

    def read(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number {limits}, not {type_name(value)}")
        if value < 1 or (largest is not None and value > largest):
            raise ValueError(f"{name} must be a whole number {limits}, not {_show(value)}")
        return int(value)

    return read


def or_none(read: Callable[[str, object], _T]) -> Callable[[str, object], _T | None]:
    return lambda name, value: None if value is None else read(name, value)


def read_channel_capacity(name: str, value: object) -> Mapping[str | re.Pattern[str], int]:
    if value is None:
        return MappingProxyType({})
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict, not {type_name(value)}")

    def read(pattern: object, capacity: object) -> tuple[str | re.Pattern[str], int]:
        if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
            shown = pattern.pattern
        elif isinstance(pattern, str):
            shown = pattern
        else:
            raise ValueError(
                f"a key of {name} must be a str or a compiled pattern of str, "
                f"not {type_name(pattern)}"
            )
        return pattern, count()(f"{name}[{shown!r}]", capacity)

    return MappingProxyType(dict(read_each(read, value.items())))


def read_exchange_name(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a str, not {type_name(value)}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    if value.startswith("amq."):
        raise ValueError(f"{name} must not start with amq., which the broker reserves")
    # pamqp refuses other characters. AMQP allows even fewer.
    if not re.fullmatch("[a-zA-Z0-9-_.:@#,/ ]+", value):
        raise ValueError(f"{name} must hold nothing but ASCII letters, digits, spaces and -_.:@#,/")
    if len(value) > _LONGEST_EXCHANGE_NAME:
        raise ValueError(f"{name} must not exceed {_LONGEST_EXCHANGE_NAME} characters")
    return value


def read_keys(name: str, value: object) -> tuple[str | bytes, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of str or bytes, not {type_name(value)}")
    keys = read_each(_read_key, [(f"{name}[{i}]", key) for i, key in enumerate(value)])
    if keys:
        try:
            importlib.import_module("cryptography.fernet")
        except ImportError as exc:
            raise ValueError(
                f"{name} needs the package cryptography: "
                "pip install channels_rabbitmq[cryptography]"
            ) from exc
    return tuple(keys)


def _read_key(name: str, value: object) -> str | bytes:
    if not isinstance(value, (str, bytes)):
        raise ValueError(f"{name} must be a str or bytes, not {type_name(value)}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    if isinstance(value, str) and not is_encodable(value):
        raise ValueError(f"{name} is a str with a lone surrogate")
    return value


def read_serializer(name: str, value: object) -> type[Any] | str:
    if value in (MSGPACK, JSON) and isinstance(value, str):
        return value
    if not isinstance(value, str) or not _DOTTED_PATH.fullmatch(value):
        return check_serializer(name, value)
    if not _has_module(value):
        raise ValueError(
            f"{name} is a dotted path, but there is no module {value.partition('.')[0]!r}"
        )
    return value


def read_hook(name: str, value: object) -> HookFunction | str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return check_hook(name, value)
    if not _DOTTED_PATH.fullmatch(value):
        raise ValueError(
            f"{name} must be a callable or the dotted path of one, such as mysite.hooks.{name}; "
            f"{NO_MESSAGE_TYPE}"
        )
    if not _has_module(value):
        module = value.partition(".")[0]
        raise ValueError(
            f"{name} is a dotted path, but there is no module {module!r}; {NO_MESSAGE_TYPE}"
        )
    return value


def _has_module(path: str) -> bool:
    """Whether a dotted path begins with a module. Imports nothing (``_hooks`` says why)."""
    module = path.partition(".")[0]
    # A search for a top-level module imports nothing.
    return module in sys.modules or importlib.util.find_spec(module) is not None


def check_hook(name: str, value: object) -> HookFunction:
    """Return ``value`` if it can be called with two arguments; else raise ValueError."""
    return _check_function(name, value, ("id", "reason"), "with two arguments, an id and a reason")


def _check_function(
    name: str, value: object, arguments: tuple[str, ...], how: str
) -> Callable[..., object]:
    if not callable(value):
        raise ValueError(
            f"{name} must be a callable or the dotted path of one, not {type_name(value)}"
        )
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return value  # Some built-in functions have no signature.
    try:
        signature.bind(*arguments)
    except TypeError as err:
        problem = str(err)
    else:
        return value
    raise ValueError(f"{name} is called {how}: {problem}")


def _show(number: float) -> str:
    # Python refuses to print an int of thousands of digits.
    return "so large a number" if abs(number) > 10**18 else repr(number)


def type_name(value: object) -> str:
    return type(value).__qualname__
