"""What a nack means: that the receiver's queue is full, or that the receiver is gone.

Up to RabbitMQ 4.1 a nack says that a queue is full. Since 4.2 the record of an exclusive queue
outlives its process, and RabbitMQ nacks what is routed there meanwhile: for some milliseconds when
a connection ends, and in a cluster for as long as a node is down, if the receiver has vanished
together with it. (Of 8 times 300 sends around a ``close()``, some raised ChannelFull 8 of 8 times
with 4.3; none with 3.10 and 4.0, which return such messages.) Either way no queue took the message,
so another try can't duplicate it. Three things tell which it is:

- *A later message was taken.* Then the queue is alive, and was full for a moment.
- *Time.* A nack counts as a return at first, and the message is tried again. A queue that was just
  being deleted is gone by the second of these tries.
- *A question*: a message for the queue of the receiver's lease (``topology``), which is on the same
  node and never full, since its consumer drops what it gets. If that queue takes the question, the
  receiver is there, and its other queue full. If it refuses, their node is down. It may not exist,
  since RabbitMQ refused it. Then the queue for requests gets the question: it never refuses for
  being full, and its consumer drops an empty request. Until 6.0 the receiver may be a
  channels_rabbitmq 4.x, which has neither: its queue counts as full.

A passive declare is no question: for a queue of a node that is down RabbitMQ answers nothing for
10 s and longer. For all other queues it says "locked", whether the owner lives or not.

An answer holds for ``VERDICT_TIMEOUT``. So of the sends of one process to a queue that stays full,
one in a second takes 0.06 s, and the others fail at once.
"""

from __future__ import annotations

from collections.abc import Callable

from .._amqp.publishing import Outcome, Route
from .._identity import to_process
from ..statistics import Counters
from .publisher import Publisher
from .topology import alive_key

# What a call is told while the broker takes no messages.
BLOCKED = "RabbitMQ takes no messages: it is low on memory or disk space, or too slow"
# Seconds after which a queue that goes on refusing isn't one that is just being deleted. With two
# busy cores that takes 1 to 10 ms on 4.3.
DELETION_TIMEOUT = 0.05
# Seconds for which an answer holds.
VERDICT_TIMEOUT = 1.0
_MOST_ROUTES = 1000  # about which something is remembered


class Refusals:
    """Finds out why a route's queue refuses messages. ``exchange`` is the groups exchange."""

    def __init__(
        self, publisher: Publisher, counters: Counters, exchange: str, clock: Callable[[], float]
    ) -> None:
        self._publisher = publisher
        self._counters = counters
        self._exchange = exchange
        self._clock = clock
        # By route: whether its queue is full, and until when that holds (loop time)
        self._verdicts: dict[Route, tuple[bool, float]] = {}

    def known(self, route: Route) -> bool | None:
        """Return True if the queue is full, False if the receiver is gone, None if not known."""
        is_full, until = self._verdicts.get(route, (None, 0.0))
        return is_full if self._clock() < until else None

    async def is_full(self, route: Route, deadline: float) -> bool:
        """Ask, unless it is known. Raises as ``Publisher.publish``."""
        is_full = self.known(route)
        if is_full is None:
            id_ = route.routing_key.rstrip("!")
            answer = await self._ask(alive_key(id_), deadline)
            if answer is Outcome.RETURNED:
                answer = await self._ask(to_process(id_), deadline)
            is_full = answer is not Outcome.NACKED
            if len(self._verdicts) >= _MOST_ROUTES:
                self._verdicts.clear()
            self._verdicts[route] = (is_full, self._clock() + VERDICT_TIMEOUT)
        return is_full

    async def _ask(self, key: str, deadline: float) -> Outcome:
        question = Route(self._exchange, key, mandatory=True)
        answer = await self._publisher.publish(b"", question, deadline)
        self.count(answer, is_full=False)
        return answer

    def count(self, outcome: Outcome | None, *, is_full: bool) -> None:
        """Count the outcome of a try, if it was a nack, once it is known what that means."""
        if outcome is Outcome.NACKED:
            if is_full:
                self._counters.nacked += 1
            else:
                self._counters.returned += 1
