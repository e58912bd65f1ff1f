"""Make ``CONFIG``, as a project writes it, into one frozen and validated value.

This module finds all mistakes that can be found without a broker, and raises
one error that names each option. So a mistake shows when the layer is made,
and not in a log line an hour later. Each option is a line of ``OPTIONS``, a
field of ``Settings`` and a parameter of ``RabbitmqChannelLayer``; the module
``readers`` has the function that reads it.

No error and no ``repr`` shows a password or a key. A value in the wrong place
may be a secret. So errors quote only numbers, names of types, and texts that
can only be the name of a module.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import ssl
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from .._amqp.url import BrokerUrl
from .._codec import MessageCodec
from .._serializers import MSGPACK, load_serializer
from .foreign_options import describe_unknown, notes_for
from .mistakes import Mistakes, collected
from .readers import (
    HookFunction,
    HostFunction,
    count,
    or_none,
    read_channel_capacity,
    read_exchange_name,
    read_flag,
    read_hook,
    read_host,
    read_keys,
    read_serializer,
    read_ssl_context,
    seconds,
    type_name,
)

# The broker, user and virtual host of a new RabbitMQ.
DEFAULT_HOST = "amqp://guest:guest@127.0.0.1/"

# The broker counts x-message-ttl in milliseconds, in 32 bits.
SHORTEST_EXPIRY = 0.001
_LONGEST_EXPIRY = (2**32 - 1) / 1000
# Brokers up to 4.2 close a consumer that leaves a delivery unacked for half an
# hour. Messages that wait in memory are unacked.
LONGEST_LOCAL_EXPIRY = 1500.0
NORMAL_QUEUE_EXPIRY = 86400.0
# A day: no call may wait without limit.
_LONGEST_TIMEOUT = 86400.0
# The prefetch count has 16 bits, and 0 would mean no limit.
LARGEST_LOCAL_CAPACITY = 2**16 - 1
_LARGEST_REMOTE_CAPACITY = 2**31 - 1
# RabbitMQ takes 64 bits, but no real queue holds a tebibyte.
_LARGEST_REMOTE_CAPACITY_BYTES = 2**40


@dataclass(frozen=True)
class Settings:
    """The options of a layer. Times are in seconds, sizes in bytes."""

    # The nodes of one cluster, at least one. Empty if host_function returns them.
    urls: tuple[BrokerUrl, ...]
    # None: an amqps:// URL's parameters say how to make one.
    ssl_context: ssl.SSLContext | None
    # How long a message may wait on the broker; None: without limit.
    expiry: float | None
    # How long a message waits in memory for receive().
    local_expiry: float
    # Messages waiting on the broker for one process; None: without limit.
    remote_capacity: int | None
    # The same limit in bytes of bodies. It is at least max_message_size: an empty queue, too,
    # refuses a larger message for ever.
    remote_capacity_bytes: int | None
    # Unacked messages held by one process.
    local_capacity: int
    # Messages kept for one channel that is behind; other limits by glob or pattern of its name.
    capacity: int
    channel_capacity: Mapping[str | re.Pattern[str], int]
    groups_exchange: str
    # Whether there are channels without "!" in their names.
    normal_channels: bool
    # Whether flush() empties everything, and other processes may have it done here.
    allow_flush: bool
    # The limit for TCP, TLS, handshake and set-up together.
    connect_timeout: float
    # The limit of any call's wait for the broker.
    operation_timeout: float
    # How long a process receives nothing before it sends itself a message; 0: it never does.
    watchdog_interval: float
    # The largest encoded message.
    max_message_size: int
    # The first key encrypts, all keys decrypt; empty: no encryption.
    symmetric_encryption_keys: tuple[str | bytes, ...] = field(repr=False)
    # What makes bytes of messages: its name, its class, or the dotted path of that.
    serializer: type[Any] | str
    # A function, or its dotted path, which is imported later; None: no function.
    on_disconnect: HookFunction | str | None
    on_reconnect: HookFunction | str | None
    # The function that returns the URLs, or its dotted path, which is imported later.
    host_function: HostFunction | str | None = None
    # Seconds after which RabbitMQ deletes the queue of a normal channel that nobody uses. It is no
    # option: ``testing`` sets it.
    normal_queue_expiry: float = NORMAL_QUEUE_EXPIRY

    @property
    def host(self) -> str:
        """A text for people that says where the broker is, without passwords."""
        function = self.host_function
        if function is None:
            return ", ".join(map(str, self.urls))
        if isinstance(function, str):
            return f"the URL of {function}"
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return f"the URL of {getattr(function, '__module__', None) or '?'}.{name}"

    @cached_property
    def codec(self) -> MessageCodec:
        """The codec for these settings. It is made once, because its keys take time.

        Raises InvalidChannelLayerError if the serializer's dotted path can't be imported.
        """
        return MessageCodec(
            max_message_size=self.max_message_size,
            symmetric_encryption_keys=self.symmetric_encryption_keys,
            serializer=load_serializer(self.serializer),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Settings:
        """Read ``CONFIG``; an option that it leaves out has its default.

        Raises ``ValueError``, which names each wrong option and the mistake.
        Warns with ``DeprecationWarning`` of ``group_expiry``, at the caller's
        caller. Uses no network and no event loop.
        """
        mistakes: list[str] = []
        values: dict[str, Any] = {}
        for option in config:
            if option not in OPTIONS and option != "group_expiry":
                mistakes.append(describe_unknown(option, OPTIONS))
        for option, (default, read) in OPTIONS.items():
            with collected(mistakes):
                values[option] = read(option, config.get(option, default))
        for check in (_check_ssl_context, _check_remote_capacity_bytes):
            with collected(mistakes):
                check(values)
        if mistakes:
            raise Mistakes(mistakes, notes=tuple(notes_for(config)))

        if values["local_expiry"] is None:
            expiry = values["expiry"]
            values["local_expiry"] = min(expiry or LONGEST_LOCAL_EXPIRY, LONGEST_LOCAL_EXPIRY)
        if "group_expiry" in config:
            warnings.warn(
                "channels_rabbitmq ignores the option group_expiry: a membership lasts until "
                "group_discard() or the end of the process, and RabbitMQ then forgets it by "
                "itself. Remove the option.",
                DeprecationWarning,
                stacklevel=3,
            )
        host = values.pop("host")
        urls, function = (host, None) if isinstance(host, tuple) else ((), host)
        return cls(urls=urls, host_function=function, **values)

    def __copy__(self) -> Settings:
        return self

    def __deepcopy__(self, memo: object) -> Settings:
        """Return itself: nothing in it changes, and an ``ssl.SSLContext`` can't be copied."""
        return self

    def __reduce__(self) -> tuple[Callable[..., Settings], tuple[dict[str, object]]]:
        """Serve pickle; raise ``PicklingError``, which names the option, if that can't be."""
        values: dict[str, object] = {
            each.name: getattr(self, each.name) for each in dataclasses.fields(self)
        }
        values["channel_capacity"] = dict(self.channel_capacity)
        for name, value in values.items():
            _require_picklable(_OPTION_OF_FIELD.get(name, name), value)
        return _unpickle, (values,)


# The options of fields that have another name.
_OPTION_OF_FIELD = {"urls": "host", "host_function": "host"}


def _unpickle(values: dict[str, Any]) -> Settings:
    capacities = MappingProxyType(values["channel_capacity"])
    return Settings(**{**values, "channel_capacity": capacities})


_PICKLE_HINTS = {
    "ssl_context": "name the certificates in the URL (cacertfile, certfile, keyfile)",
    "serializer": "give the dotted path of the class",
}


def _require_picklable(name: str, value: object) -> None:
    try:
        pickle.dumps(value)
    except Exception:
        hint = _PICKLE_HINTS.get(name, "give the dotted path of a function")
    else:
        return
    raise pickle.PicklingError(
        f"a channel layer can't be pickled if the option {name} holds a value of type "
        f"{type_name(value)} which can't; {hint}"
    )


# Options that must fit each other. ``values`` lacks the options that have a mistake themselves.


def _check_remote_capacity_bytes(values: Mapping[str, Any]) -> None:
    room, largest = values.get("remote_capacity_bytes"), values.get("max_message_size", 0)
    if room is not None and room < largest:
        raise ValueError(
            f"remote_capacity_bytes must be at least max_message_size ({largest}), not {room}: "
            "RabbitMQ would refuse a larger message for ever"
        )


def _check_ssl_context(values: Mapping[str, Any]) -> None:
    urls = values.get("host")
    if isinstance(urls, tuple):
        check_ssl_context(values.get("ssl_context"), urls)


def check_ssl_context(context: ssl.SSLContext | None, urls: tuple[BrokerUrl, ...]) -> None:
    """Raise ValueError if ``context`` doesn't fit these URLs."""
    for url in urls if context is not None else ():
        if not url.tls:
            raise ValueError(f"ssl_context needs amqps:// in host, but that has {url}")
        if url.cacertfile or url.certfile or not url.verify:
            raise ValueError(
                "ssl_context excludes the parameters cacertfile, certfile, keyfile and "
                "verify_none in host: they would be ignored"
            )


# The options that a project may set: the default, and the function that reads a value.
OPTIONS: Mapping[str, tuple[object, Callable[[str, object], object]]] = {
    "host": (DEFAULT_HOST, read_host),
    "ssl_context": (None, read_ssl_context),
    "expiry": (60, or_none(seconds(SHORTEST_EXPIRY, _LONGEST_EXPIRY))),
    "local_expiry": (None, or_none(seconds(0, LONGEST_LOCAL_EXPIRY))),
    "remote_capacity": (10_000, or_none(count(_LARGEST_REMOTE_CAPACITY))),
    "remote_capacity_bytes": (32 * 1024 * 1024, or_none(count(_LARGEST_REMOTE_CAPACITY_BYTES))),
    "local_capacity": (100, count(LARGEST_LOCAL_CAPACITY)),
    "capacity": (10_000, count()),
    "channel_capacity": (None, read_channel_capacity),
    "groups_exchange": ("groups", read_exchange_name),
    "normal_channels": (False, read_flag),
    "allow_flush": (False, read_flag),
    "connect_timeout": (10, seconds(0, _LONGEST_TIMEOUT)),
    "operation_timeout": (10, seconds(0, _LONGEST_TIMEOUT)),
    "watchdog_interval": (30, seconds(0, _LONGEST_TIMEOUT, or_zero=True)),
    "max_message_size": (16 * 1024 * 1024, count()),
    "symmetric_encryption_keys": (None, read_keys),
    "serializer": (MSGPACK, read_serializer),
    "on_disconnect": (None, read_hook),
    "on_reconnect": (None, read_hook),
}
