"""``HandOvers``: messages on their way to receivers on other event loops.

The head of ``router.py`` says why there are three steps.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from .accounting import Accounting
from .mailbox import Delivery, Mailbox
from .mailboxes import Mailboxes
from .relief import Relief

if TYPE_CHECKING:
    from ..statistics import Counters
    from .ages import Ages


class HandedOver:
    """A message on its way to a receiver on another event loop."""

    __slots__ = ("channel", "delivery")

    def __init__(self, channel: str, delivery: Delivery) -> None:
        self.channel = channel
        self.delivery = delivery

    def message(self) -> dict[str, Any]:
        """Return the message.

        For a direct message every call returns the same object. So the receiver may have it
        requeued only if no other code has seen it.
        """
        return self.delivery.envelope.message()


class HandOvers:
    """The hand-overs of one router that are neither accepted nor requeued yet.

    ``receive(channel, take)`` is the router's. ``len()`` of it may be asked for in any thread.
    """

    def __init__(
        self,
        receive: Callable[[str, Callable[[Mailbox, float], HandedOver]], Awaitable[HandedOver]],
        mailboxes: Mailboxes,
        accounting: Accounting,
        relief: Relief,
        counters: Counters,
        ages: Ages,
        clock: Callable[[], float],
    ) -> None:
        self._receive = receive
        self._mailboxes = mailboxes
        self._accounting = accounting
        self._relief = relief
        self._counters = counters
        self._ages = ages
        self._clock = clock
        self._pending: set[HandedOver] = set()

    async def hand_over(self, channel: str) -> HandedOver:
        """Wait like ``Router.receive``, for a receiver on another event loop.

        The caller ends the returned hand-over by :meth:`accept` or :meth:`requeue`. These do
        nothing once the router is closed.
        """
        return await self._receive(channel, self._take)

    def _take(self, mailbox: Mailbox, now: float) -> HandedOver:
        handed_over = HandedOver(mailbox.channel, self._mailboxes.pop(mailbox))
        self._pending.add(handed_over)
        return handed_over

    def accept(self, handed_over: HandedOver) -> None:
        """End a hand-over: the receiver has the message."""
        if handed_over in self._pending:
            self._pending.remove(handed_over)
            self._counters.consumed += 1
            now = self._clock()
            self._ages.note(now - handed_over.delivery.published_at, handed_over.channel, now)

    def requeue(self, handed_over: HandedOver) -> None:
        """End a hand-over without a receiver: put the message back where it was."""
        if handed_over not in self._pending:
            return
        self._pending.remove(handed_over)
        mailbox = self._mailboxes.open(handed_over.channel)
        self._mailboxes.holding[mailbox] = None
        place = mailbox.insert(handed_over.delivery)
        # All messages before it were requeued, too.
        assert place <= mailbox.early_acked, "the oldest are those acked early"
        self._accounting.note_early_acked(mailbox, handed_over.delivery)
        self._relief.keep_bounds([mailbox])
        self._mailboxes.wake(mailbox)

    def clear(self) -> None:
        """Forget all of them."""
        self._pending.clear()

    def __len__(self) -> int:
        return len(self._pending)
