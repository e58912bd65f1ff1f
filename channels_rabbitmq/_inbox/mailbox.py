"""The router's data: a delivery of the broker, and the mailbox of one channel.

These classes hold data and answer questions about them. The rules are in ``router.py``.

A group's delivery may be in the mailboxes of many members. So a delivery keeps nothing that differs
from mailbox to mailbox. Each mailbox has one number, ``early_acked``: how many of its messages were
acked early. These are always the *oldest* ones, because the router acks all messages of a mailbox
at once and later ones come behind them. So a message in a mailbox costs one slot of a deque, or
nothing if it is alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .._codec import Envelope


class Acker(Protocol):
    """Acks the deliveries of one connection."""

    def ack(self, delivery_tag: int) -> None:
        """Tell the broker that it may forget a delivery."""


class Delivery:
    """One delivery of the broker, shared by the mailboxes that hold it."""

    __slots__ = (
        "acker",
        "early_acked",
        "envelope",
        "expires_at",
        "number",
        "published_at",
        "tag",
        "unacked",
    )

    def __init__(
        self,
        envelope: Envelope,
        tag: int,
        acker: Acker,
        expires_at: float,
        published_at: float,
        number: int,
    ) -> None:
        self.envelope = envelope
        # The broker's number for this delivery, needed for the ack
        self.tag = tag
        # None once the delivery is acked or its connection is lost
        self.acker: Acker | None = acker
        # Both are by the router's clock, in seconds. If it isn't known when the message was
        # published, that is the time of its arrival.
        self.expires_at = expires_at
        self.published_at = published_at
        # Deliveries are numbered in the order of their arrival.
        self.number = number
        # How many mailboxes hold and count this delivery. At 0 it is acked.
        self.unacked = 0
        # How many mailboxes hold this delivery without counting it
        self.early_acked = 0


class Mailbox:
    """The messages of one channel and the ``receive()`` calls that wait for them.

    A mailbox exists while it holds a message or a call. The channel of an idle websocket has a
    mailbox with one waiter. There may be very many mailboxes, so each makes its containers only
    when it needs them.
    """

    __slots__ = (
        "channel",
        "early_acked",
        "early_acked_bytes",
        "first",
        "more_waiters",
        "reserved",
        "rest",
        "waiter",
    )

    def __init__(self, channel: str) -> None:
        self.channel = channel
        # The oldest message, and the messages behind it. ``rest`` is None or not empty.
        self.first: Delivery | None = None
        self.rest: deque[Delivery] | None = None
        # How many of the oldest messages were acked before they were received, and their bytes
        self.early_acked = 0
        self.early_acked_bytes = 0
        # The receive() to wake next, and the calls behind it. Some may be cancelled already.
        self.waiter: asyncio.Future[None] | None = None
        self.more_waiters: deque[asyncio.Future[None]] | None = None
        # How many receive() calls were woken and haven't run yet. Each has a message reserved.
        self.reserved = 0

    @property
    def size(self) -> int:
        """How many messages the mailbox holds."""
        if self.first is None:
            return 0
        return 1 if self.rest is None else 1 + len(self.rest)

    @property
    def unacked(self) -> int:
        """How many of its messages count against ``local_capacity``."""
        return self.size - self.early_acked

    @property
    def is_behind(self) -> bool:
        """Whether the mailbox holds a message that isn't reserved for a woken ``receive()``."""
        return self.size > self.reserved

    def has_expired(self, now: float) -> bool:
        """Whether its oldest message has expired."""
        return self.first is not None and self.first.expires_at <= now

    @property
    def is_idle(self) -> bool:
        return self.first is None and self.waiter is None and not self.reserved

    def messages(self) -> Iterator[Delivery]:
        """All messages, oldest first."""
        if self.first is not None:
            yield self.first
            yield from self.rest or ()

    def append(self, delivery: Delivery) -> None:
        """Put a message behind others; there is one."""
        if self.rest is None:
            self.rest = deque((delivery,))
        else:
            self.rest.append(delivery)

    def insert(self, delivery: Delivery) -> int:
        """Put a message back between those that arrived before and after it; return its place."""
        messages = list(self.messages())
        place = sum(each.number < delivery.number for each in messages)
        messages.insert(place, delivery)
        self.first = messages[0]
        self.rest = deque(messages[1:]) or None
        return place

    def add_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Queue a ``receive()`` behind those that wait already."""
        if self.waiter is None:
            self.waiter = waiter
        elif self.more_waiters is None:
            self.more_waiters = deque((waiter,))
        else:
            self.more_waiters.append(waiter)

    def add_waiter_first(self, waiter: asyncio.Future[None]) -> None:
        """Queue a ``receive()`` that was woken and found no message, before all others."""
        if self.waiter is not None:
            if self.more_waiters is None:
                self.more_waiters = deque()
            self.more_waiters.appendleft(self.waiter)
        self.waiter = waiter

    def pop_waiter(self) -> asyncio.Future[None] | None:
        """Take out the ``receive()`` to wake next; skip those that were cancelled."""
        while (waiter := self.waiter) is not None:
            self.waiter = self.more_waiters.popleft() if self.more_waiters else None
            if not waiter.done():
                return waiter
        return None

    def remove_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Take out a ``receive()`` that was cancelled, unless ``pop_waiter()`` has done so."""
        if self.waiter is waiter:
            self.waiter = self.more_waiters.popleft() if self.more_waiters else None
        elif self.more_waiters and waiter in self.more_waiters:
            self.more_waiters.remove(waiter)
