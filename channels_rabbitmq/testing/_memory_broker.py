"""``MemoryBroker``: what RabbitMQ and the processes are to ``RabbitmqChannelLayer``, in memory.

Every event loop and every thread of a process may use one at the same time, so all of it is behind
one lock. No code of the project, such as a serializer, runs while the lock is held.

A ``receive()`` that finds no message waits on a future of its own event loop. Resolving the future
only wakes the call, which then looks again. So a call that is cancelled has taken nothing, and it
passes its wake-up on.

Each event loop has an ``Owner``, all sync code of the process has one together: as with RabbitMQ,
the name of a channel begins with the id of its owner, and the channel ends with it. Normal channels
have no owner.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from channels.exceptions import StopConsumer

from .._codec import Envelope
from .._futures import resolve
from .._identity import ChannelNames, id_of, new_id
from .._inbox.members import Members
from .._reporter import Reporter
from ..statistics import Counters

logger = logging.getLogger("channels_rabbitmq.messages")

_all: weakref.WeakSet[MemoryBroker] = weakref.WeakSet()


@dataclass(eq=False)
class Owner:
    """What has channels of its own: an event loop, or (``loop`` is None) all sync code."""

    loop: asyncio.AbstractEventLoop | None
    id: str = field(default_factory=new_id)
    counters: Counters = field(default_factory=Counters)
    since: float = field(default_factory=time.time)
    is_closed: bool = False  # by close()

    def __post_init__(self) -> None:
        self.names = ChannelNames(self.id)
        self.reporter = Reporter(logger, self.id)

    @property
    def has_ended(self) -> bool:
        """Whether its event loop was closed."""
        return self.loop is not None and self.loop.is_closed()

    @property
    def is_gone(self) -> bool:
        """Whether its event loop has ended without a close()."""
        return self.has_ended and not self.is_closed


@dataclass(eq=False)
class _Waiter:
    """One ``receive()`` that waits, and whose event loop, or sync code, has called it."""

    by: Owner
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]
    is_woken: bool = False

    def wake(self) -> bool:
        """Return whether its event loop can still hear of it."""
        self.is_woken = True
        try:
            self.loop.call_soon_threadsafe(resolve, self.future, None)
        except RuntimeError:  # The loop is closed.
            return False
        return True


class _Mailbox:
    """The messages of one channel, and the calls that wait for one. To be used with the lock."""

    def __init__(self, owner: Owner | None) -> None:
        self.owner = owner
        self.waiters: deque[_Waiter] = deque()
        self._messages: deque[tuple[Envelope, float]] = deque()

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, envelope: Envelope, expiry: float) -> None:
        self._messages.append((envelope, time.monotonic() + expiry))
        self.wake_one()

    def wake_one(self) -> None:
        while self.waiters and not self.waiters.popleft().wake():
            pass

    def wake_all_by(self, owner: Owner) -> None:
        for waiter in [waiter for waiter in self.waiters if waiter.by is owner]:
            self.waiters.remove(waiter)
            waiter.wake()

    def pop(self) -> Envelope | None:
        return self._messages.popleft()[0] if self._messages else None

    def drop_expired(self) -> int:
        """Return how many there were."""
        before, now = len(self), time.monotonic()
        while self._messages and self._messages[0][1] <= now:
            self._messages.popleft()
        return before - len(self)

    def clear(self) -> int:
        """Drop all messages; return how many there were."""
        dropped = len(self)
        self._messages.clear()
        return dropped


class MemoryBroker:
    """Channels, their messages, and groups. Any thread may use it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.RLock()
        self._mailboxes: dict[str, _Mailbox] = {}
        self._members = Members()  # normal channels among them
        self._owners: dict[str, Owner] = {}
        self._by_loop: dict[asyncio.AbstractEventLoop, Owner] = {}
        self._sync_owner: Owner | None = None
        _all.add(self)

    # Owners

    def owner_of_loop(self, loop: asyncio.AbstractEventLoop) -> Owner:
        """Return the owner of an event loop's channels; the first call makes it."""
        with self._lock:
            self._forget_gone()
            if loop not in self._by_loop:
                self._by_loop[loop] = self._add(Owner(loop))
            return self._by_loop[loop]

    def owner_of_sync_code(self) -> Owner:
        """Return the owner of sync code's channels: a new one after a ``close()``."""
        with self._lock:
            self._forget_gone()
            if self._sync_owner is None or self._sync_owner.is_closed:
                self._sync_owner = self._add(Owner(None))
            return self._sync_owner

    def _add(self, owner: Owner) -> Owner:
        self._owners[owner.id] = owner
        return owner

    def owner_of(self, channel: str) -> Owner | None:
        """Return the owner of a channel; None if there is none, or its event loop has ended."""
        with self._lock:
            self._forget_gone()
            return self._owners.get(id_of(channel))

    def owners(self) -> list[Owner]:
        """Return all whose event loops haven't ended, in the order of their first calls."""
        with self._lock:
            self._forget_gone()
            return [owner for owner in self._owners.values() if not owner.has_ended]

    def close(self, owner: Owner) -> None:
        """End the channels of an owner, the calls that wait for their messages, and its own."""
        with self._lock:
            owner.is_closed = True
            self._forget_channels(owner)
            for mailbox in self._mailboxes.values():
                mailbox.wake_all_by(owner)

    def _forget_gone(self) -> None:
        for owner in [owner for owner in self._owners.values() if owner.is_gone]:
            del self._owners[owner.id]
            self._forget_channels(owner)
        for loop in [loop for loop in self._by_loop if loop.is_closed()]:
            del self._by_loop[loop]

    def _forget_channels(self, owner: Owner) -> None:
        for group in list(self._members.groups()):
            for channel in filter(owner.names.is_local, list(self._members.channels(group))):
                self._members.discard(group, channel)
        for channel in filter(owner.names.is_local, list(self._mailboxes)):
            mailbox = self._mailboxes.pop(channel)
            while mailbox.waiters:
                mailbox.waiters.popleft().wake()

    # Messages

    def put(
        self, channel: str, owner: Owner | None, envelope: Envelope, *, expiry: float, capacity: int
    ) -> bool:
        """Put a message into a channel for ``expiry`` seconds; False if it is full."""
        with self._lock:
            mailbox = self._mailboxes.setdefault(channel, _Mailbox(owner))
            self._drop_expired(channel, mailbox)
            is_full = len(mailbox) >= capacity
            if not is_full:
                mailbox.put(envelope, expiry)
            if owner is not None:
                owner.counters.delivered += 1
                owner.counters.enqueued += not is_full
            return not is_full

    async def receive(self, channel: str, owner: Owner | None, by: Owner) -> dict[str, Any]:
        """Wait for a message of a channel, ``by`` whom doesn't matter to its owner.

        Cancelling loses nothing. Raises StopConsumer once one of the two is closed.
        """
        waiter: _Waiter | None = None
        try:
            while True:
                envelope, waiter = self._pop_or_wait(channel, owner, by)
                if waiter is None:
                    break
                await waiter.future
        except BaseException:
            if waiter is not None:
                self._discard(channel, waiter)
            raise
        assert envelope is not None, "else there is a waiter"
        return envelope.message()

    def _pop_or_wait(
        self, channel: str, owner: Owner | None, by: Owner
    ) -> tuple[Envelope | None, _Waiter | None]:
        loop = asyncio.get_running_loop()
        with self._lock:
            if by.is_closed or (owner is not None and owner.is_closed):
                raise StopConsumer
            mailbox = self._mailboxes.setdefault(channel, _Mailbox(owner))
            self._drop_expired(channel, mailbox)
            envelope = mailbox.pop()
            if envelope is None:
                waiter = _Waiter(by, loop, loop.create_future())
                mailbox.waiters.append(waiter)
                return None, waiter
            if owner is None:
                by.counters.normal_consumed += 1
            else:
                owner.counters.consumed += 1
            self._forget_if_idle(channel, mailbox)
            return envelope, None

    def _discard(self, channel: str, waiter: _Waiter) -> None:
        with self._lock:
            mailbox = self._mailboxes.get(channel)
            if mailbox is None:
                return
            if waiter in mailbox.waiters:
                mailbox.waiters.remove(waiter)
            elif waiter.is_woken and len(mailbox):
                mailbox.wake_one()
            self._forget_if_idle(channel, mailbox)

    def _drop_expired(self, channel: str, mailbox: _Mailbox) -> None:
        dropped = mailbox.drop_expired()
        if dropped and mailbox.owner is not None:
            mailbox.owner.counters.expired += dropped
            mailbox.owner.reporter.report_now("expired", channel, dropped)

    def _forget_if_idle(self, channel: str, mailbox: _Mailbox) -> None:
        if not mailbox.waiters and not len(mailbox):
            self._mailboxes.pop(channel, None)

    def flush(self) -> None:
        """Drop all messages, and take all channels out of all groups."""
        with self._lock:
            self._members.clear()
            for mailbox in self._mailboxes.values():
                dropped = mailbox.clear()
                if mailbox.owner is not None:
                    mailbox.owner.counters.flushed += dropped

    # Groups

    def join(self, group: str, channel: str, info: bytes | None) -> None:
        with self._lock:
            membership = self._members.add(group, channel)
            self._members.finish_add(membership, True, info)

    def leave(self, group: str, channel: str) -> None:
        with self._lock:
            self._members.discard(group, channel)

    def channels_in(self, group: str) -> list[str]:
        """Return the members of a group, normal channels included."""
        with self._lock:
            self._forget_gone()
            return list(self._members.channels(group))

    def members(self, group: str) -> list[tuple[str, bytes | None]]:
        """Return the members of a group, but for normal channels, each with its packed info."""
        with self._lock:
            self._forget_gone()
            return [member for member in self._members.confirmed(group) if "!" in member[0]]

    # For operators

    def held(self, owner: Owner) -> tuple[int, int, int, int]:
        """Return how many an owner has: channels in use, their messages, receivers, and groups."""
        with self._lock:
            own = [mailbox for mailbox in self._mailboxes.values() if mailbox.owner is owner]
            messages = sum(map(len, own))
            everywhere = [one for mailbox in self._mailboxes.values() for one in mailbox.waiters]
            receivers = sum(waiter.by is owner for waiter in everywhere)
            return len(own), messages, receivers, sum(self._is_in(owner))

    def _is_in(self, owner: Owner) -> Iterator[bool]:
        for group in self._members.groups():
            yield any(map(owner.names.is_local, self._members.channels(group)))


def seconds(expiry: float | None) -> float:
    """Return an option's value as a number; None is no limit."""
    return math.inf if expiry is None else expiry


def flush_all() -> None:
    """Empty all that this process has."""
    for broker in list(_all):
        if broker.pid == os.getpid():
            broker.flush()
