"""``CONFIG``, as a project writes it, made into one frozen and validated value.

All mistakes that can be seen without a broker are told here, in words that
name the option: at construction, instead of in a log line an hour later.
No error and no ``repr`` shows a password or a key. So errors quote only
numbers and names of types, and what can only be a module's name; a value that
is in the wrong place may be secret.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import ssl
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ._amqp.url import BrokerUrl

DEFAULT_HOST = "amqp://guest:guest@127.0.0.1/asgi"

# The broker counts x-message-ttl in milliseconds, in 32 bits.
_SHORTEST_EXPIRY = 0.001
_LONGEST_EXPIRY = (2**32 - 1) / 1000
# Brokers up to 4.2 close a consumer that leaves a delivery unacked for half an
# hour; what waits in memory is unacked.
_LONGEST_LOCAL_EXPIRY = 1500.0
# A day: no call may wait without limit.
_LONGEST_TIMEOUT = 86400.0
# The prefetch count has 16 bits, and 0 would mean no limit.
_LARGEST_LOCAL_CAPACITY = 2**16 - 1
_LARGEST_REMOTE_CAPACITY = 2**31 - 1
_LONGEST_EXCHANGE_NAME = 127

# Called with the id of a LoopLayer and a reason; what an async one returns is awaited.
HookFunction = Callable[[str, str], object]

_OPTIONS = (
    "host",
    "ssl_context",
    "expiry",
    "local_expiry",
    "remote_capacity",
    "local_capacity",
    "capacity",
    "channel_capacity",
    "groups_exchange",
    "connect_timeout",
    "operation_timeout",
    "max_message_size",
    "symmetric_encryption_keys",
    "on_disconnect",
    "on_reconnect",
    "group_expiry",
)


@dataclass(frozen=True)
class Settings:
    """What a layer is to do. Times are in seconds, sizes in bytes."""

    # At least one; the nodes of one cluster.
    urls: tuple[BrokerUrl, ...]
    # None: made from each URL's parameters, if that is amqps://.
    ssl_context: ssl.SSLContext | None
    # How long a message may wait on the broker; None: without limit.
    expiry: float | None
    # How long a message waits in memory for receive().
    local_expiry: float
    # Messages waiting on the broker for one process; None: without limit.
    remote_capacity: int | None
    # Unacked messages held by one process.
    local_capacity: int
    # Messages kept for one stalled channel, and overrides by glob or pattern of its name.
    capacity: int
    channel_capacity: Mapping[str | re.Pattern[str], int]
    groups_exchange: str
    # For TCP, TLS, handshake and set-up together.
    connect_timeout: float
    # For any call's wait for the broker.
    operation_timeout: float
    # The largest encoded message.
    max_message_size: int
    # The first encrypts, all decrypt; empty: no encryption.
    symmetric_encryption_keys: tuple[str | bytes, ...] = field(repr=False)
    # What to call, or its dotted path, which is imported later; None: nothing.
    on_disconnect: HookFunction | str | None
    on_reconnect: HookFunction | str | None

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Settings:
        """Read ``CONFIG``; what it leaves out has its default.

        Raises ``ValueError``, which names the option and what is wrong with
        it. Warns with ``DeprecationWarning`` of ``group_expiry``, at the
        caller's caller. Touches no network and no event loop.
        """
        for option in config:
            if option not in _OPTIONS:
                raise ValueError(_describe_unknown(option))
        if "group_expiry" in config:
            warnings.warn(
                "channels_rabbitmq ignores the option group_expiry: a membership lasts until "
                "group_discard() or the end of the process, and RabbitMQ then forgets it by "
                "itself. Remove the option.",
                DeprecationWarning,
                stacklevel=3,
            )

        urls = _read_host(config.get("host", DEFAULT_HOST))
        expiry = _read_optional_seconds(
            "expiry", config.get("expiry", 60), _SHORTEST_EXPIRY, _LONGEST_EXPIRY
        )
        local_expiry = _read_optional_seconds(
            "local_expiry", config.get("local_expiry"), 0, _LONGEST_LOCAL_EXPIRY
        )
        if local_expiry is None:
            local_expiry = min(
                _LONGEST_LOCAL_EXPIRY if expiry is None else expiry, _LONGEST_LOCAL_EXPIRY
            )
        remote_capacity = config.get("remote_capacity", 100)
        return cls(
            urls=urls,
            ssl_context=_read_ssl_context(config.get("ssl_context"), urls),
            expiry=expiry,
            local_expiry=local_expiry,
            remote_capacity=(
                None
                if remote_capacity is None
                else _read_count("remote_capacity", remote_capacity, _LARGEST_REMOTE_CAPACITY)
            ),
            local_capacity=_read_count(
                "local_capacity", config.get("local_capacity", 100), _LARGEST_LOCAL_CAPACITY
            ),
            capacity=_read_count("capacity", config.get("capacity", 100)),
            channel_capacity=_read_channel_capacity(config.get("channel_capacity")),
            groups_exchange=_read_exchange_name(config.get("groups_exchange", "groups")),
            connect_timeout=_read_seconds(
                "connect_timeout", config.get("connect_timeout", 10), 0, _LONGEST_TIMEOUT
            ),
            operation_timeout=_read_seconds(
                "operation_timeout", config.get("operation_timeout", 10), 0, _LONGEST_TIMEOUT
            ),
            max_message_size=_read_count(
                "max_message_size", config.get("max_message_size", 16 * 1024 * 1024)
            ),
            symmetric_encryption_keys=_read_keys(config.get("symmetric_encryption_keys")),
            on_disconnect=_read_hook("on_disconnect", config.get("on_disconnect")),
            on_reconnect=_read_hook("on_reconnect", config.get("on_reconnect")),
        )


def _describe_unknown(option: object) -> str:
    known = ", ".join(_OPTIONS[:-1])
    if not isinstance(option, str):
        return f"an option's name must be a str, not {_type_name(option)}; known are {known}"
    nearest = difflib.get_close_matches(option, _OPTIONS, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known are {known}"
    return f"unknown option {option!r}; {hint}"


def _read_host(value: object) -> tuple[BrokerUrl, ...]:
    if isinstance(value, str):
        return (_read_url("host", value),)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"host must be a URL or a list of URLs, not {_type_name(value)}")
    if not value:
        raise ValueError("host must be a URL or a list of URLs; the list is empty")
    return tuple(_read_url(f"host[{index}]", url) for index, url in enumerate(value))


def _read_url(name: str, value: object) -> BrokerUrl:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a URL, a str, not {_type_name(value)}")
    try:
        return BrokerUrl.parse(value)
    except ValueError as exc:
        problem = str(exc)
    raise ValueError(f"{name}: {problem}")


def _read_ssl_context(value: object, urls: tuple[BrokerUrl, ...]) -> ssl.SSLContext | None:
    if value is None:
        return None
    if not isinstance(value, ssl.SSLContext):
        raise ValueError(f"ssl_context must be None or an ssl.SSLContext, not {_type_name(value)}")
    for url in urls:
        if not url.tls:
            raise ValueError(f"ssl_context needs amqps:// in host, but that has {url}")
        if url.cacertfile or url.certfile or not url.verify:
            raise ValueError(
                "ssl_context excludes the parameters cacertfile, certfile, keyfile and "
                "verify_none in host: they would be ignored"
            )
    return value


def _read_seconds(name: str, value: object, shortest: float, longest: float) -> float:
    """``shortest`` itself is allowed, unless it is 0."""
    limits = f"{f'from {shortest:g}' if shortest else 'above 0'} up to {longest:.0f}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number of seconds {limits}, not {_type_name(value)}")
    # False for NaN, too.
    if not (value > 0 and shortest <= value <= longest):
        raise ValueError(f"{name} must be a number of seconds {limits}, not {_show(value)}")
    return float(value)


def _read_optional_seconds(
    name: str, value: object, shortest: float, longest: float
) -> float | None:
    return None if value is None else _read_seconds(name, value, shortest, longest)


def _read_count(name: str, value: object, largest: int | None = None) -> int:
    limits = "of at least 1" if largest is None else f"from 1 to {largest}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number {limits}, not {_type_name(value)}")
    if value < 1 or (largest is not None and value > largest):
        raise ValueError(f"{name} must be a whole number {limits}, not {_show(value)}")
    return int(value)


def _read_channel_capacity(value: object) -> Mapping[str | re.Pattern[str], int]:
    if value is None:
        return MappingProxyType({})
    if not isinstance(value, Mapping):
        raise ValueError(f"channel_capacity must be a dict, not {_type_name(value)}")
    capacities: dict[str | re.Pattern[str], int] = {}
    for pattern, capacity in value.items():
        if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
            shown = pattern.pattern
        elif isinstance(pattern, str):
            shown = pattern
        else:
            raise ValueError(
                "a key of channel_capacity must be a str or a compiled pattern of str, "
                f"not {_type_name(pattern)}"
            )
        capacities[pattern] = _read_count(f"channel_capacity[{shown!r}]", capacity)
    return MappingProxyType(capacities)


def _read_exchange_name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"groups_exchange must be a str, not {_type_name(value)}")
    if not value:
        raise ValueError("groups_exchange must not be empty")
    if value.startswith("amq."):
        raise ValueError("groups_exchange must not start with amq., which the broker reserves")
    # What pamqp lets pass; AMQP allows even less.
    if not re.fullmatch("[a-zA-Z0-9-_.:@#,/ ]+", value):
        raise ValueError(
            "groups_exchange must hold nothing but ASCII letters, digits, spaces and -_.:@#,/"
        )
    if len(value) > _LONGEST_EXCHANGE_NAME:
        raise ValueError(f"groups_exchange must not exceed {_LONGEST_EXCHANGE_NAME} characters")
    return value


def _read_keys(value: object) -> tuple[str | bytes, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"symmetric_encryption_keys must be a list of str or bytes, not {_type_name(value)}"
        )
    for index, key in enumerate(value):
        name = f"symmetric_encryption_keys[{index}]"
        if not isinstance(key, (str, bytes)):
            raise ValueError(f"{name} must be a str or bytes, not {_type_name(key)}")
        if not key:
            raise ValueError(f"{name} must not be empty")
        if isinstance(key, str) and not _is_encodable(key):
            raise ValueError(f"{name} is a str with a lone surrogate")
    if value:
        try:
            importlib.import_module("cryptography.fernet")
        except ImportError as exc:
            raise ValueError(
                "symmetric_encryption_keys needs the package cryptography: "
                "pip install channels_rabbitmq[cryptography]"
            ) from exc
    return tuple(value)


def _read_hook(name: str, value: object) -> HookFunction | str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return check_hook(name, value)
    parts = value.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(
            f"{name} must be a callable or the dotted path of one, such as mysite.hooks.{name}"
        )
    # Nothing is imported now (see _hooks), and to look for a top-level module imports nothing.
    if parts[0] not in sys.modules and importlib.util.find_spec(parts[0]) is None:
        raise ValueError(f"{name} is a dotted path, but there is no module {parts[0]!r}")
    return value


def check_hook(name: str, value: object) -> HookFunction:
    """Return what can be called with two arguments; else raise ValueError."""
    if not callable(value):
        raise ValueError(
            f"{name} must be a callable or the dotted path of one, not {_type_name(value)}"
        )
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return value  # Some that are built in have none.
    try:
        signature.bind("id", "reason")
    except TypeError as err:
        problem = str(err)
    else:
        return value
    raise ValueError(f"{name} is called with two arguments, an id and a reason: {problem}")


def _show(number: float) -> str:
    # Python refuses to print an int of thousands of digits.
    return "so large a number" if abs(number) > 10**18 else repr(number)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _type_name(value: object) -> str:
    return type(value).__qualname__
