"""What the router keeps: a delivery of the broker, and the mailbox of one channel.

These are data with the questions one can ask of them; the rules are in ``_router.py``.

A delivery may be in many mailboxes (a group's members), so nothing that differs from mailbox to
mailbox is kept with it. That works because the messages of a mailbox which don't count against
``local_capacity`` are always its *oldest*: a mailbox that stops counting does so with all it
holds, and what arrives afterwards comes behind. One number per mailbox, ``uncounted``, says where
the border is, and a message in a mailbox costs one slot of a deque, or a tuple if it is alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ._codec import Envelope

# Seconds without a reader after which a channel may be found stalled, and for which a loan counts
PATIENCE = 1.0
# The most that a channel's patience grows to
MAX_PATIENCE = 30.0


class Acker(Protocol):
    """By whom a delivery is acked: it belongs to one connection."""

    def ack(self, delivery_tag: int) -> None:
        """Tell the broker that it may forget a delivery."""


class Delivery:
    """One delivery of the broker, shared by the mailboxes that hold it."""

    __slots__ = ("acker", "arrived", "counting", "envelope", "number", "tag", "uncounted")

    def __init__(
        self, envelope: Envelope, tag: int, acker: Acker, arrived: float, number: int
    ) -> None:
        self.envelope = envelope
        # By which the broker is told that we are done
        self.tag = tag
        # None once it is told, or when the connection is lost
        self.acker: Acker | None = acker
        # By the router's clock, in seconds
        self.arrived = arrived
        # Deliveries are numbered in the order of their arrival.
        self.number = number
        # How many mailboxes hold it and count it: the last one to let go of it acks it ...
        self.counting = 0
        # ... and how many hold it without counting it.
        self.uncounted = 0


class Loan:
    """A message that a mailbox has lent: its receiver, on another event loop, may not take it."""

    __slots__ = ("channel", "counts", "delivery", "lent_at")

    def __init__(self, channel: str, delivery: Delivery, counts: bool, lent_at: float) -> None:
        self.channel = channel
        self.delivery = delivery
        # By the router's clock, in seconds
        self.lent_at = lent_at
        # Whether it still counts against local_capacity for its mailbox
        self.counts = counts

    def message(self) -> dict[str, Any]:
        """The message: the same at each call if it is a channel's.

        So who gives the loan back must not have shown it to anybody.
        """
        return self.delivery.envelope.message()


class Mailbox:
    """The messages of one channel and the ``receive()`` calls that wait for them.

    It exists as long as there are any of either. An idle websocket is a mailbox with one waiter,
    and there may be very many of them, so containers are made only when needed.
    """

    __slots__ = (
        "active_at",
        "backlog",
        "channel",
        "messages",
        "more_waiters",
        "patience",
        "stalled",
        "uncounted",
        "waiter",
        "woken",
    )

    def __init__(self, channel: str, now: float) -> None:
        self.channel = channel
        # Oldest first; None if there is none. One alone is in a tuple (unless there were more, or
        # it was given back), at a tenth of a deque's time and space.
        self.messages: tuple[Delivery] | deque[Delivery] | None = None
        # The messages again while nothing is special about them: several came, all count, the
        # channel isn't stalled. When that is so again, it is set by the next one that comes.
        self.backlog: deque[Delivery] | None = None
        # How many of the messages, the oldest, don't count against local_capacity
        self.uncounted = 0
        # Whether what arrives doesn't count either; ends with the next receive()
        self.stalled = False
        # When a reader was last here and found something; or else when the mailbox was made
        self.active_at = now
        # Seconds without a reader after which it may be found stalled
        self.patience = PATIENCE
        # The receive() to wake next, and those behind it. Some may be cancelled and not yet gone.
        self.waiter: asyncio.Future[None] | None = None
        self.more_waiters: deque[asyncio.Future[None]] | None = None
        # How many receive() calls were woken and have yet to run; each has a message set aside.
        self.woken = 0

    def __lt__(self, other: Mailbox) -> bool:
        """Some order, for heaps: what was given back may be in a new mailbox of its channel."""
        return id(self) < id(other)

    def popleft(self) -> Delivery:
        """Take out the oldest message; there is one."""
        messages = self.messages
        assert messages is not None
        if not isinstance(messages, deque):
            self.messages = None
            return messages[0]
        delivery = messages.popleft()
        if not messages:
            self.messages = self.backlog = None
        return delivery

    @property
    def is_idle(self) -> bool:
        return self.messages is None and self.waiter is None and not self.woken

    def is_silent(self, now: float) -> bool:
        """Whether messages have lain here longer than its patience without any reader."""
        if self.messages is None or self.waiter is not None or self.woken or self.stalled:
            return False
        since = now - self.patience
        return self.messages[0].arrived < since and self.active_at < since

    def note_reader(self, now: float) -> None:
        """A ``receive()`` was called: the channel is not stalled any more.

        One that was stalled is more likely slow than stuck, since it came back. If it were found
        stalled again at each of its pauses, its backlog would run through memory and overflow
        there, and its senders would never learn of it; so from now on it may take twice the time
        it has just taken, and its backlog stays on the broker. The price is that the others wait
        longer for it (``MAX_PATIENCE`` at most) should it get stuck after all.
        """
        if self.stalled:
            self.stalled = False
            self.patience = min(2 * (now - self.active_at), MAX_PATIENCE)
        self.active_at = now

    def add_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Queue a ``receive()`` behind those that wait already."""
        if self.waiter is None:
            self.waiter = waiter
        elif self.more_waiters is None:
            self.more_waiters = deque((waiter,))
        else:
            self.more_waiters.append(waiter)

    def add_waiter_first(self, waiter: asyncio.Future[None]) -> None:
        """Queue a ``receive()`` that has already been woken once, and in vain."""
        if self.waiter is not None:
            if self.more_waiters is None:
                self.more_waiters = deque()
            self.more_waiters.appendleft(self.waiter)
        self.waiter = waiter

    def pop_waiter(self) -> asyncio.Future[None] | None:
        """Take out the ``receive()`` to wake next, leaving out those that were cancelled."""
        while (waiter := self.waiter) is not None:
            self.waiter = self.more_waiters.popleft() if self.more_waiters else None
            if not waiter.done():
                return waiter
        return None

    def remove_waiter(self, waiter: asyncio.Future[None]) -> bool:
        """Take out a ``receive()`` that was cancelled.

        Returns False if ``pop_waiter()`` has done so before; the mailbox may be gone since.
        """
        if self.waiter is waiter:
            self.waiter = self.more_waiters.popleft() if self.more_waiters else None
        elif self.more_waiters and waiter in self.more_waiters:
            self.more_waiters.remove(waiter)
        else:
            return False
        return True
