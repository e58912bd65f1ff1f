"""The id of a ``LoopLayer``, and the names that are made of it.

The name of a channel begins with the id of the ``LoopLayer`` that made it, and "!". By that the
sender finds the receiver's queue. An id is valid as long as its ``LoopLayer`` lives, whatever
becomes of its connections.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from typing import NamedTuple

LONGEST_NAME = 99  # characters; the specification's limit
_ID_PREFIX = "crq."
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_ID_LENGTH = 16
_RANDOM_LENGTH = 12
_ID = re.compile(rf"{re.escape(_ID_PREFIX)}[{_ALPHABET}]{{{_ID_LENGTH}}}")

_LONGEST_HOST = 255  # characters that are shown

# The recipient of requests to all processes. No group's name holds "!", so these requests reach no
# process with 4.x, which knows nothing of them.
TO_ALL = "!all"


class Place(NamedTuple):
    """Where an event loop runs."""

    pid: int
    host: str


def own_place() -> Place:
    """Return where this process runs."""
    # A host's name need not be UTF-8; Python has lone surrogates for its bytes then.
    host = socket.gethostname()[:_LONGEST_HOST].encode(errors="backslashreplace").decode()
    return Place(os.getpid(), host)


def new_id() -> str:
    """Return an id that was never used before."""
    return _ID_PREFIX + _random_text(_ID_LENGTH)


def is_id(text: str) -> bool:
    """Whether a text has the form of a ``LoopLayer``'s id."""
    return _ID.fullmatch(text) is not None


def to_process(id_: str) -> str:
    """Return the recipient of requests to the process (or rather ``LoopLayer``) ``id_``."""
    return f"{id_}!requests"


def id_of(channel: str) -> str:
    """Return the id of the ``LoopLayer`` that made a channel."""
    return channel.partition("!")[0]


class ChannelNames:
    """The names of the channels that one ``LoopLayer`` makes."""

    def __init__(self, id_: str) -> None:
        # Alone it is the channel of the watchdog's probes.
        self.prefix = id_ + "!"

    def new(self, prefix: str) -> str:
        """Return a name that was never used before; ``prefix`` is the caller's part of it."""
        room = LONGEST_NAME - len(self.prefix) - _RANDOM_LENGTH
        return f"{self.prefix}{prefix[:room]}{_random_text(_RANDOM_LENGTH)}"

    def is_local(self, channel: str) -> bool:
        """Whether the channel was made here."""
        return channel.startswith(self.prefix)

    def is_valid(self, channel: str) -> bool:
        """Whether ``receive()`` may be called for the channel, so that a message can wait in it."""
        return self.is_local(channel) and len(self.prefix) < len(channel) <= LONGEST_NAME

    def require_local(self, channel: str) -> None:
        """Raise ValueError for a channel that wasn't made here."""
        if channel == self.prefix:
            raise ValueError(f"The channel {channel} wasn't made by new_channel()")
        if not self.is_local(channel):
            raise ValueError(
                f"The channel {channel} belongs to another process or event loop: only the one "
                "that made it by new_channel() can receive from it, or add it to groups"
            )


def _random_text(length: int) -> str:
    # Not from `random`, which users seed: two processes would get the same names.
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
