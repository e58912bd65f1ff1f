"""Which acks to write for the deliveries that were done with."""

from __future__ import annotations


class AckBatch:
    """Collects delivery tags; tells how few acks say the same.

    The *front* is the highest tag up to which everything is done. One ack with ``multiple`` moves
    it; what is done beyond it is acked one by one.

    RabbitMQ answers an ack for a tag that isn't outstanding by closing the AMQP channel, and with
    ``multiple`` it acks *everything* before it notices. So ``multiple`` always names a tag that
    was collected now, never one that was acked alone before.
    """

    def __init__(self) -> None:
        self._front = 0
        self._done: set[int] = set()  # acked beyond the front
        self._collected: list[int] = []

    def add(self, tag: int) -> bool:
        """Collect one tag; return True if it is the first since ``take``."""
        self._collected.append(tag)
        return len(self._collected) == 1

    def take(self) -> list[tuple[int, bool]]:
        """Return (delivery tag, multiple) for each ack to write."""
        collected, self._collected = self._collected, []
        done = self._done
        done.update(collected)
        front = self._front
        while front + 1 in done:
            front += 1
            done.remove(front)
        if front == self._front:
            return [(tag, False) for tag in collected]
        self._front = front
        acks = [(max(tag for tag in collected if tag <= front), True)]
        acks += [(tag, False) for tag in collected if tag > front]
        return acks
