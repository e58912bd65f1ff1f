"""Which acks to write for deliveries that are to be acked."""

from __future__ import annotations

from collections import OrderedDict


class AckBatch:
    """Collects delivery tags, and returns as few acks as possible for them.

    One ack with ``multiple`` is for all collected tags below the oldest outstanding one. Collected
    tags above it are acked one by one.

    RabbitMQ answers an ack for a tag that isn't outstanding by closing the AMQP channel, and with
    ``multiple`` it acks *all of them* before it notices. So ``multiple`` always names a tag that
    was collected now, never one that was acked alone before.
    """

    def __init__(self) -> None:
        # Delivered and not yet collected, in order: no more than the prefetch count. (Not a dict:
        # to take the first of one again and again is quadratic.)
        self._outstanding: OrderedDict[int, None] = OrderedDict()
        self._collected: list[int] = []

    def expect(self, tag: int) -> None:
        """Note a delivery; tags grow."""
        self._outstanding[tag] = None

    def add(self, tag: int) -> bool:
        """Collect one tag; return True if it is the first since ``drain``."""
        self._outstanding.pop(tag, None)
        self._collected.append(tag)
        return len(self._collected) == 1

    def drain(self) -> list[tuple[int, bool]]:
        """Return (delivery tag, multiple) for each ack to write."""
        collected, self._collected = self._collected, []
        if not self._outstanding:
            return [(max(collected), True)] if collected else []
        oldest = next(iter(self._outstanding))
        below = [tag for tag in collected if tag < oldest]
        acks = [(max(below), True)] if below else []
        acks += [(tag, False) for tag in collected if tag > oldest]
        return acks
