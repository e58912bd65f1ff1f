"""``Relief``: when and which channels are relieved, and the bounds of messages acked early.

The head of ``router.py`` gives the reasons for these rules.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from operator import attrgetter

from .accounting import EARLY_ACKED_BYTES, Accounting
from .mailbox import Mailbox
from .mailboxes import Mailboxes


class Relief:
    """Acks the messages of the fullest channels early, as long as other channels are held up.

    ``capacity_of(channel)`` is how many early acked messages a channel may hold.
    ``call_soon(callback)`` is the event loop's.
    """

    def __init__(
        self,
        mailboxes: Mailboxes,
        accounting: Accounting,
        *,
        local_capacity: int,
        capacity_of: Callable[[str], int],
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._mailboxes = mailboxes
        self._accounting = accounting
        self._capacity_of = capacity_of
        self._call_soon = call_soon
        # The number of deliveries that count at which the fullest channels are relieved
        self.threshold = (local_capacity + 1) // 2
        # The number of deliveries that count at which relieving stops
        self._little = local_capacity // 4
        self._is_due = False

    def consider(self) -> None:
        """Relieve in a moment if other channels wait. Call it when ``threshold`` is reached."""
        if self._mailboxes.waiting_receivers and not self._is_due:
            self._is_due = True
            self._call_soon(self._relieve_next_turn)

    def _relieve_next_turn(self) -> None:
        # One turn more: the first half of a burst has scheduled this call, and the receivers that
        # the second half has woken run after it. With one turn only, 26 of 100 messages to healthy
        # channels were acked early.
        self._call_soon(self.relieve)

    def relieve(self) -> None:
        """If others are held up, stop counting the messages of the fullest channels."""
        self._is_due = False
        if not self._mailboxes.waiting_receivers or self._accounting.unacked < self.threshold:
            return
        behind = [mailbox for mailbox in self._mailboxes.holding if mailbox.is_behind]
        behind.sort(key=attrgetter("size"), reverse=True)
        relieved = []
        for mailbox in behind:
            if self._accounting.unacked <= self._little:
                break
            self._accounting.ack_early(mailbox)
            relieved.append(mailbox)
        self.keep_bounds(relieved)

    def keep_bounds(self, mailboxes: Sequence[Mailbox]) -> None:
        """Drop messages beyond the bounds, after more in ``mailboxes`` were acked early."""
        for mailbox in mailboxes:
            capacity = self._capacity_of(mailbox.channel)
            while mailbox.early_acked > capacity:
                self._mailboxes.drop_overflowing(mailbox)
        if self._accounting.early_acked_bytes > EARLY_ACKED_BYTES:
            self._drop_bytes()

    def _drop_bytes(self) -> None:
        """Drop the oldest messages of the largest channels, until the bytes are within their bound.

        The largest is the channel with the most bytes, not the most messages. Otherwise a channel
        with many small messages would lose them because of another one's large ones.
        """
        largest = [
            (-mailbox.early_acked_bytes, n, mailbox)
            for n, mailbox in enumerate(self._mailboxes.holding)
        ]
        heapq.heapify(largest)
        while self._accounting.early_acked_bytes > EARLY_ACKED_BYTES:
            _, n, mailbox = largest[0]
            self._mailboxes.drop_overflowing(mailbox)
            heapq.heapreplace(largest, (-mailbox.early_acked_bytes, n, mailbox))
