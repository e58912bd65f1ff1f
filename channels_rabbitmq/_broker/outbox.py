"""``Outbox``: messages that can't be written yet, in the order in which their calls came.

A call may wait for the connection, for room in the socket's buffer, for the binding of its group,
or for the queue of its own process. No call that comes later passes it: while one waits, each
newcomer joins the end. What a message itself waits for, it waits for at the same time as the
others; only the writing goes in order.

``drain`` writes everything at the front that is ready, in one turn of the event loop. So there is
no moment in which a message is let through and not written, a hundred that waited for a connection
share one write to the socket, and once nobody waits any more a newcomer may write at once: the path
of each message costs one look whether the outbox is empty.

No I/O: the Publisher gives the function that writes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from .._amqp.publishing import Outcome, Route
from .._futures import Waiters

Confirm = asyncio.Future[Outcome]


class WaitingMessage:
    """One message in an outbox; its call waits for ``turn`` and looks at the rest."""

    __slots__ = ("body", "confirm", "deadline", "error", "is_done", "is_ready", "route", "turn")

    def __init__(self, body: bytes, route: Route, deadline: float) -> None:
        self.body = body
        self.route = route
        self.deadline = deadline  # loop time
        self.is_ready = False  # it waits for nothing of its own (any more)
        self.is_done = False  # written, or refused
        self.confirm: Confirm | None = None  # once it is written
        self.error: Exception | None = None  # why it can't be written
        self.turn = Waiters()

    def finish(self, confirm: Confirm | None = None, error: Exception | None = None) -> None:
        """Have its call go on."""
        self.is_done = True
        self.confirm = confirm
        self.error = error
        self.turn.wake()


class Outbox:
    """The messages that wait to be written.

    ``write(message)`` writes one, now: it returns the future of its confirm, or None if nothing can
    be written at the moment; whoever gives it calls ``drain`` when that has changed. ``clock`` is
    the event loop's.
    """

    def __init__(
        self, write: Callable[[WaitingMessage], Confirm | None], clock: Callable[[], float]
    ) -> None:
        self._write = write
        self._clock = clock
        # Those that wait; empty almost always, which each publish looks at.
        # OrderedDict and not dict: taking the first of a dict again and again is quadratic.
        self.messages: OrderedDict[WaitingMessage, None] = OrderedDict()

    def add(self, message: WaitingMessage) -> None:
        """Put a message at the end."""
        self.messages[message] = None

    def discard(self, message: WaitingMessage) -> None:
        """Take a message out, if it is there still; those behind it go on."""
        if message in self.messages:
            del self.messages[message]
            self.drain()

    def drain(self) -> None:
        """Write those at the front that are ready, as long as anything can be written."""
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
            # One whose time is over is as good as gone: its call says so in this very moment.
            del self.messages[message]

    def refuse(self) -> None:
        """Have all that wait go unwritten."""
        messages, self.messages = self.messages, OrderedDict()
        for message in messages:
            message.finish()

    def look_again(self) -> None:
        """Have all calls look anew at what they wait for."""
        for message in self.messages:
            message.turn.wake()
