"""``Outbox``: messages that can't be written yet, in the order of their calls.

A message may wait for the connection, for room in the socket's buffer, for the binding of its
group, or for the queue of its own process. No later message passes it: while one waits, each new
one joins the end. They wait at the same time, each for its own event; only the writing is in order.

``drain`` writes all ready messages at the front in one turn of the event loop. So a message is
never let through and not yet written, and a hundred messages that waited for a connection share one
write to the socket. Once no message waits, a new one is written at once: all that it costs then is
one look whether the outbox is empty.

No I/O: the Publisher gives the function that writes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from .._amqp.publishing import Outcome, Route
from .._futures import Waiters

Confirm = asyncio.Future[Outcome]


@dataclass(eq=False, slots=True)
class WaitingMessage:
    """One message in an outbox; its call waits for ``turn`` and looks at the rest."""

    body: bytes
    route: Route
    deadline: float  # loop time
    is_ready: bool = False  # It waits for no event of its own, or no more.
    is_done: bool = False  # written, or never to be written
    confirm: Confirm | None = None  # once it is written
    error: Exception | None = None  # why it can't be written
    turn: Waiters = field(default_factory=Waiters)

    def finish(self, confirm: Confirm | None = None, error: Exception | None = None) -> None:
        """Have its call go on."""
        self.is_done = True
        self.confirm = confirm
        self.error = error
        self.turn.wake()


class Outbox:
    """The messages that wait to be written.

    ``write(message)`` writes one at once. It returns the future of its confirm, or None if nothing
    can be written at the moment; the owner calls ``drain`` when that has changed. ``clock``: loop
    time.
    """

    def __init__(
        self, write: Callable[[WaitingMessage], Confirm | None], clock: Callable[[], float]
    ) -> None:
        self._write = write
        self._clock = clock
        # Empty almost always; each publish looks at it.
        # OrderedDict and not dict: taking the first of a dict again and again is quadratic.
        self.messages: OrderedDict[WaitingMessage, None] = OrderedDict()

    def add(self, message: WaitingMessage) -> None:
        """Put a message at the end."""
        self.messages[message] = None

    def discard(self, message: WaitingMessage) -> None:
        """Take a message out, if it is still there; those behind it go on."""
        if message in self.messages:
            del self.messages[message]
            self.drain()

    def drain(self) -> None:
        """Write the ready messages at the front, as long as anything can be written."""
        now = self._clock()
        while self.messages:
            message = next(iter(self.messages))
            if message.deadline > now:
                if not message.is_ready:
                    return
                try:
                    confirm = self._write(message)
                except Exception as err:
                    message.finish(error=err)
                else:
                    if confirm is None:
                        return
                    message.finish(confirm)
            # If its time is over, its call raises in this very turn of the loop.
            del self.messages[message]

    def discard_all(self) -> None:
        """Let all messages go unwritten: publishers are blocked."""
        messages, self.messages = self.messages, OrderedDict()
        for message in messages:
            message.finish()

    def look_again(self) -> None:
        """Have all calls look again whether they must wait, and for what."""
        for message in self.messages:
            message.turn.wake()
