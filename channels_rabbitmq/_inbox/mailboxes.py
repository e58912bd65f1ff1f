"""``Mailboxes``: the mailboxes of one event loop's channels that hold or await a message.

``router.py`` has the rules for when these methods are called.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING

from .accounting import Accounting
from .mailbox import Delivery, Mailbox

if TYPE_CHECKING:
    from ..statistics import Counters


class Mailboxes:
    """Mailboxes by channel. Of the idle ones only the one that was read last is kept.

    ``report(reason, channel)`` is called for each message dropped: ``"expired"`` or
    ``"overflowed"``.
    """

    def __init__(
        self, accounting: Accounting, counters: Counters, report: Callable[[str, str], None]
    ) -> None:
        self._accounting = accounting
        self._counters = counters
        self._report = report
        self.by_channel: dict[str, Mailbox] = {}
        # The mailboxes that hold messages; a dict, for its order
        self.holding: dict[Mailbox, None] = {}
        # How many receive() calls wait and were not woken
        self.waiting_receivers = 0
        self._just_idle: Mailbox | None = None

    def open(self, channel: str) -> Mailbox:
        """Return the mailbox of a channel; make it if there is none."""
        mailbox = self.by_channel.get(channel)
        if mailbox is None:
            mailbox = self.by_channel[channel] = Mailbox(channel)
        return mailbox

    def forget_if_idle(self, mailbox: Mailbox) -> None:
        if mailbox.is_idle and self.by_channel.get(mailbox.channel) is mailbox:
            del self.by_channel[mailbox.channel]

    def clear(self) -> list[Mailbox]:
        """Forget all mailboxes and return them."""
        mailboxes = list(self.by_channel.values())
        self.by_channel.clear()
        self.holding.clear()
        self.waiting_receivers = 0
        self._just_idle = None
        return mailboxes

    # Messages

    def pop(self, mailbox: Mailbox) -> Delivery:
        """Take out the oldest message, to be handed out, handed over or dropped; there is one."""
        delivery = mailbox.first
        assert delivery is not None
        if mailbox.rest is not None:
            mailbox.first = mailbox.rest.popleft()
            mailbox.rest = mailbox.rest or None
        else:
            mailbox.first = None
            del self.holding[mailbox]
            if mailbox.waiter is None and not mailbox.reserved:
                # Most receivers come back at once, and go on with this mailbox. So it is forgotten
                # only when another one is idle.
                former, self._just_idle = self._just_idle, mailbox
                if former is not None and former.waiter is None and former is not mailbox:
                    self.forget_if_idle(former)
        if mailbox.early_acked:
            self._accounting.release_early_acked(mailbox, delivery)
        else:
            delivery.unacked -= 1
            if not delivery.unacked:
                self._accounting.ack(delivery)
        return delivery

    def drop_expired(self, mailbox: Mailbox, now: float) -> None:
        while mailbox.has_expired(now):
            self.pop(mailbox)
            self._counters.expired += 1
            self._report("expired", mailbox.channel)

    def drop_all_expired(self, now: float) -> None:
        """Drop the expired messages of all channels."""
        for mailbox in [mailbox for mailbox in self.holding if mailbox.has_expired(now)]:
            self.drop_expired(mailbox, now)

    def drop_overflowing(self, mailbox: Mailbox) -> None:
        """Drop the oldest message, which is beyond a bound."""
        self.pop(mailbox)
        self._counters.overflowed += 1
        self._report("overflowed", mailbox.channel)

    def drop_all(self) -> None:
        """Drop all messages."""
        for mailbox in list(self.holding):
            while mailbox.first is not None:
                self.pop(mailbox)
                self._counters.flushed += 1
            self.forget_if_idle(mailbox)

    # Receivers

    def wake(self, mailbox: Mailbox) -> None:
        """Wake receivers as long as there are messages that are not reserved for others."""
        while mailbox.is_behind and (waiter := mailbox.pop_waiter()) is not None:
            mailbox.reserved += 1
            self.waiting_receivers -= 1
            wake_up(waiter)

    def discard_waiter(self, mailbox: Mailbox, waiter: asyncio.Future[None]) -> None:
        """Clean up after a cancelled receiver, whether it was woken or not."""
        if waiter.done() and not waiter.cancelled():
            mailbox.reserved -= 1
            self.wake(mailbox)
        else:
            self.waiting_receivers -= 1
            mailbox.remove_waiter(waiter)
        self.forget_if_idle(mailbox)

    # For operators

    def __len__(self) -> int:
        """Return how many mailboxes are not idle. Any thread may call."""
        idle = self._just_idle
        is_there = idle is not None and idle.is_idle and self.by_channel.get(idle.channel) is idle
        return len(self.by_channel) - is_there

    def fullest(self, count: int) -> list[tuple[str, int]]:
        """Return the channels with the most messages that count, and their numbers."""
        held = ((mailbox.unacked, mailbox.channel) for mailbox in self.holding)
        return [(channel, n) for n, channel in heapq.nlargest(count, held) if n]

    def oldest(self) -> Mailbox | None:
        """Return the mailbox whose oldest message came first; of several, the fullest."""
        held = ((mailbox.first, mailbox) for mailbox in self.holding)
        waiting = [(-first.number, mailbox.size, mailbox) for first, mailbox in held if first]
        return max(waiting, key=itemgetter(0, 1), default=(0, 0, None))[2]

    def relieved(self, expires_by: float) -> list[tuple[str, int]]:
        """Return the relieved channels whose oldest message expires by then, and their sizes."""
        return [
            (mailbox.channel, mailbox.size)
            for mailbox in self.holding
            if mailbox.early_acked
            and mailbox.first is not None
            and mailbox.first.expires_at < expires_by
        ]


def wake_up(waiter: asyncio.Future[None]) -> None:
    """Wake a receiver, unless its event loop is closed."""
    with contextlib.suppress(RuntimeError):
        waiter.set_result(None)
