"""``Greeter``: publishes *hello* on each new connection, and answers other processes' by *here*.

- *Hello* goes to all, again and again until the broker has confirmed it. Then all processes know
  this one. So the first ``group_add()`` on a connection returns only after that.
- *Every hello is answered*. When a process didn't answer if it had greeted itself lately, 36 of 90
  pairs of processes never met (measured). The answers are spread over ``SPREAD``. If more than
  ``MOST_SINGLE`` are due, one for all takes their place.
- *Settled.* A process that has just connected knows no other. A settled process that answers its
  hello names all processes that it knows, by hearsay too, and it has heard each earlier hello. So
  one such answer is enough to know all, and then this process is settled, too. Without one it is
  settled ``SETTLE_TIMEOUT`` after its hello: then it is alone, or all have just begun, as after a
  restart of the broker, and have greeted each other. No result is complete before that. (A *here*
  names the hellos that it answers: one that answers others may be older, and lack a process.)
- *Absent.* A process that gets a request returned tells all about it (``processes`` says why). It
  waits a moment, and tells everything that it has found by then at once, but for what others have
  told meanwhile.

While the broker blocks publishers nothing is published; ``group_add()`` doesn't wait for it then.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping

from .._amqp.publishing import Outcome
from .._codec import MessageCodec
from .._futures import Waiters, call_at, start_task
from .._identity import TO_ALL, Place, to_process
from ..exceptions import BrokerUnavailable
from .link import Link
from .processes import Processes
from .requests import ABSENT, HELLO, HERE, Greeting

SPREAD = 0.05  # seconds
MOST_SINGLE = 5
SETTLE_TIMEOUT = 0.5  # seconds
# Seconds that a confirm may take until a greeting is repeated.
_CONFIRM_TIMEOUT = 5.0
# More than so many names don't fit a greeting; then all wait until they are settled by time.
_MOST_NAMES = 1000

# All others have a greeting then. (A nack comes from a queue that is just being deleted.)
_DELIVERED = (Outcome.CONFIRMED, Outcome.NACKED, Outcome.RETURNED)


class Greeter:
    """Greets for the ``LoopLayer`` ``id_``. ``on_settled()`` is called when it knows all."""

    def __init__(
        self,
        id_: str,
        processes: Processes,
        link: Link,
        codec: MessageCodec,
        on_settled: Callable[[], None],
        place: Place,
    ) -> None:
        self._id = id_
        self._place = place
        self._processes = processes
        self._link = link
        self._codec = codec
        self._on_settled = on_settled
        self._loop = asyncio.get_running_loop()
        self.connection = 0  # its number; 0 while there is none
        self._connections = 0
        self.is_greeted = False  # the hello of this connection is confirmed
        self.is_settled = False
        self._greeted = Waiters()  # woken when the wait for that may be over
        link.call_when_blocked(self._greeted.wake)
        self._due: dict[str, int] = {}  # hellos to answer: the number of each process's last one
        self._hello: asyncio.Task[None] | None = None
        self._here: asyncio.Task[None] | None = None
        self._found_absent: set[str] = set()  # by this process, and not published yet
        self._absent: asyncio.Task[None] | None = None
        self._settle_timer: asyncio.TimerHandle | None = None

    def on_ready(self) -> None:
        """This process receives requests from now on: greet the others."""
        self._connections += 1
        self.connection = self._connections
        self._hello = start_task(self._publish_hello(), name="channels_rabbitmq hello")

    def on_lost(self) -> None:
        """The connection is gone."""
        self.connection = 0
        self.is_greeted = self.is_settled = False
        if self._settle_timer is not None:
            self._settle_timer.cancel()
        if self._hello is not None:
            self._hello.cancel()
        self._greeted.wake()

    async def wait_greeted(self, deadline: float) -> bool:
        """Wait until all know this process, or publishers are blocked; return whether it waited.

        Raises BrokerUnavailable if that takes longer than ``deadline`` (loop time).
        """
        waits = False
        while self._is_hello_due():
            waits = True
            await self._link.wait_publisher_ready(deadline)
            if self._loop.time() >= deadline:
                raise BrokerUnavailable("RabbitMQ did not confirm in time that it told others")
            if self._is_hello_due():  # That may have changed while the publisher connected.
                await self._greeted.wait(deadline)
        return waits

    def _is_hello_due(self) -> bool:
        """Whether hello isn't confirmed, though the broker doesn't block publishers."""
        return not self.is_greeted and not self._link.is_blocked

    async def _publish_hello(self) -> None:
        hello = Greeting(HELLO, self._id, self.connection, place=self._place)
        await self._publish_until_confirmed(hello, TO_ALL)
        self.is_greeted = True
        self._greeted.wake()
        self._settle_timer = call_at(self._loop.time() + SETTLE_TIMEOUT, self._settle)

    async def _publish_until_confirmed(self, greeting: Greeting, recipient: str) -> None:
        body = self._codec.encode_for_channel(recipient, greeting.message())
        while True:
            await self._link.wait_unblocked()
            try:
                deadline = self._loop.time() + _CONFIRM_TIMEOUT
                if await self._link.publish(recipient, body, deadline) in _DELIVERED:
                    return
            except BrokerUnavailable:
                pass
            await asyncio.sleep(0.1)

    def _settle(self) -> None:
        if not self.is_settled and self.connection:
            self.is_settled = True
            self._on_settled()

    def on_hello(self, id_: str, number: int) -> None:
        """Another process has connected: answer it."""
        self._due[id_] = number
        if self._here is None:
            self._here = start_task(self._answer_hellos(), name="channels_rabbitmq here")

    async def _answer_hellos(self) -> None:
        try:
            while self._due:
                await asyncio.sleep(random.uniform(0, SPREAD))
                await self._link.wait_unblocked()
                due, self._due = self._due, {}
                answered = tuple(due.items())
                known, absent = self._names(), self._processes.absences()
                greeting = Greeting(
                    HERE,
                    self._id,
                    answered=answered,
                    known=known,
                    absent=absent if known else {},
                    place=self._place,
                )
                recipients = [TO_ALL] if len(due) > MOST_SINGLE else map(to_process, due)
                for recipient in recipients:
                    await self._publish_until_confirmed(greeting, recipient)
        finally:
            self._here = None

    def _names(self) -> tuple[str, ...] | None:
        names = self._processes.known() if self.is_settled else []
        return tuple(names) if self.is_settled and len(names) <= _MOST_NAMES else None

    def on_here(self, here: Greeting) -> None:
        """Another process has answered our hello, or that of others."""
        if here.known is not None:
            self._processes.on_hearsay(here.known)
            self._processes.on_absent_elsewhere(here.absent)
            if (self._id, self.connection) in here.answered:
                self._settle()

    def on_found_absent(self, id_: str) -> None:
        """A process that was present has no queue: tell the others."""
        self._found_absent.add(id_)
        if self._absent is None and self.connection:
            self._absent = start_task(self._publish_absent(), name="channels_rabbitmq absent")

    async def _publish_absent(self) -> None:
        try:
            await asyncio.sleep(random.uniform(SPREAD, 2 * SPREAD))
            ages = self._processes.absences()
            absent = {id_: ages[id_] for id_ in self._found_absent if id_ in ages}
            self._found_absent.clear()
            if absent and len(absent) <= _MOST_NAMES and not self._link.is_blocked:
                body = self._codec.encode_for_channel(
                    TO_ALL, Greeting(ABSENT, self._id, absent=absent).message()
                )
                # Once is enough: if a process doesn't hear it, the next one that asks tells it.
                await self._link.publish(TO_ALL, body, self._loop.time() + _CONFIRM_TIMEOUT)
        except BrokerUnavailable:
            pass
        finally:
            self._absent = None

    async def wait_absent_told(self) -> None:
        """Wait until the others know which processes this one has found absent, if not for long.

        A command that ends behind its question would take that with it.
        """
        if self._absent is not None:
            await asyncio.wait([self._absent], timeout=_CONFIRM_TIMEOUT)

    def on_absent(self, absent: Mapping[str, float]) -> None:
        """Another process has told which are absent, and for how many seconds each."""
        self._found_absent.difference_update(absent)
        self._processes.on_absent_elsewhere(absent)

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Those that are running."""
        tasks = (self._hello, self._here, self._absent)
        return [task for task in tasks if task is not None and not task.done()]

    def close(self) -> None:
        """Publish nothing more."""
        self.on_lost()
        for task in self.tasks:
            task.cancel()
