"""``Accounting``: which deliveries count against ``local_capacity``, and which were acked early.

A delivery counts from its arrival until the last mailbox that counts it has handed it out, dropped
it or acked it early. Then the broker gets the ack. Messages that were acked early are measured in
bytes. A group's message is in many mailboxes and is measured once.
"""

from __future__ import annotations

from itertools import islice

from .mailbox import Delivery, Mailbox

# The most bytes of messages that are acked early and not yet received.
EARLY_ACKED_BYTES = 64 * 1024 * 1024
# Bytes that a message takes in memory beyond its body: 550 to 830 were measured.
MESSAGE_OVERHEAD = 700


class Accounting:
    """The accounts of all mailboxes of one event loop."""

    __slots__ = ("early_acked_bytes", "stalled_channels", "unacked")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all deliveries."""
        # Deliveries that count against local_capacity
        self.unacked = 0
        # Bytes of all messages that a mailbox holds as acked early; the number of such mailboxes
        self.early_acked_bytes = 0
        self.stalled_channels = 0

    def release_early_acked(self, mailbox: Mailbox, delivery: Delivery) -> None:
        """Note that ``mailbox`` doesn't hold ``delivery``, which was acked early, any more."""
        mailbox.early_acked -= 1
        if not mailbox.early_acked:
            self.stalled_channels -= 1
        size = _size(delivery)
        mailbox.early_acked_bytes -= size
        delivery.early_acked -= 1
        if not delivery.early_acked:
            self.early_acked_bytes -= size

    def ack_early(self, mailbox: Mailbox) -> None:
        """Stop counting the messages of ``mailbox``; ack those that no other mailbox counts."""
        for delivery in islice(mailbox.messages(), mailbox.early_acked, None):
            self.note_early_acked(mailbox, delivery)
            delivery.unacked -= 1
            if not delivery.unacked:
                self.ack(delivery)

    def note_early_acked(self, mailbox: Mailbox, delivery: Delivery) -> None:
        """Note that ``mailbox`` holds ``delivery`` as acked early, so doesn't count it."""
        if not mailbox.early_acked:
            self.stalled_channels += 1
        mailbox.early_acked += 1
        size = _size(delivery)
        mailbox.early_acked_bytes += size
        if not delivery.early_acked:
            self.early_acked_bytes += size
            delivery.envelope.compact()
        delivery.early_acked += 1

    def ack(self, delivery: Delivery) -> None:
        """Tell the broker that no mailbox counts this delivery any more."""
        self.unacked -= 1
        if delivery.acker is not None:
            delivery.acker.ack(delivery.tag)
            delivery.acker = None


def _size(delivery: Delivery) -> int:
    return delivery.envelope.size + MESSAGE_OVERHEAD
