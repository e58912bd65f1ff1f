"""``Greeter``: says *hello* on each new connection, and answers *here* to others.

- *Hello* goes to all, again and again until the broker has confirmed it. Then all processes know
  this one. So the first ``group_add()`` on a connection returns only after that.
- *Every hello is answered*, by *here*. With "not if it has said hello itself lately", 36 of 90
  pairs of processes never met (measured). The answers are spread over ``SPREAD``, and if more than
  ``MOST_SINGLE`` are due, one for all takes their place.
- *Settled.* A process that has just connected knows nobody. A settled process that answers its
  hello names all that it knows, also by hearsay, and has heard each hello that was said before. So
  a single such answer suffices to know all. This process is settled then, or if none has come
  ``SETTLE_TIMEOUT`` after its hello: then it is alone, or all have just begun, as after a restart
  of the broker, and have greeted each other. Before that no result is complete. (An answer names
  the hellos that it is for: one for others may be older, and lack somebody.)
- *Absent.* Who finds that a process has no queue tells all (``processes`` says why), a moment later
  and all that it has found by then at once, but not what others have told meanwhile.

While the broker blocks publishers nothing is said; ``group_add()`` doesn't wait for it then.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping

from .._amqp.publishing import Outcome
from .._codec import MessageCodec
from .._futures import Waiters, call_at, start_task
from .._identity import TO_ALL, to_process
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

# A nack says that some queue has refused it, one that is just being deleted: all others have it.
_SAID = (Outcome.CONFIRMED, Outcome.NACKED, Outcome.RETURNED)


class Greeter:
    """Greets for the ``LoopLayer`` ``id_``. ``on_settled()`` is called when it knows all."""

    def __init__(
        self,
        id_: str,
        processes: Processes,
        link: Link,
        codec: MessageCodec,
        on_settled: Callable[[], None],
    ) -> None:
        self._id = id_
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
        self._due: dict[str, int] = {}  # who waits for an answer, and to which of its hellos
        self._hello: asyncio.Task[None] | None = None
        self._here: asyncio.Task[None] | None = None
        self._found_absent: set[str] = set()  # by this process, and not told yet
        self._telling: asyncio.Task[None] | None = None
        self._settle_timer: asyncio.TimerHandle | None = None

    def on_ready(self) -> None:
        """This process receives requests from now on."""
        self._connections += 1
        self.connection = self._connections
        self._hello = start_task(self._say_hello(), name="channels_rabbitmq hello")

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
        """Wait until all know this process, or can't be told now; return whether it had to wait.

        Raises BrokerUnavailable if that takes longer than ``deadline`` (loop time).
        """
        waits = False
        while not self.is_greeted and not self._link.is_blocked:
            waits = True
            await self._link.wait_sending(deadline)
            if self._loop.time() >= deadline:
                raise BrokerUnavailable("RabbitMQ did not confirm in time that it told others")
            await self._greeted.wait(deadline)
        return waits

    async def _say_hello(self) -> None:
        await self._say_until_confirmed(Greeting(HELLO, self._id, self.connection), TO_ALL)
        self.is_greeted = True
        self._greeted.wake()
        self._settle_timer = call_at(self._loop.time() + SETTLE_TIMEOUT, self._settle)

    async def _say_until_confirmed(self, greeting: Greeting, recipient: str) -> None:
        body = self._codec.encode_for_channel(recipient, greeting.message())
        while True:
            await self._link.wait_usable()
            try:
                deadline = self._loop.time() + _CONFIRM_TIMEOUT
                if await self._link.publish(recipient, body, deadline) in _SAID:
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
            self._here = start_task(self._say_here(), name="channels_rabbitmq here")

    async def _say_here(self) -> None:
        try:
            while self._due:
                await asyncio.sleep(random.uniform(0, SPREAD))
                await self._link.wait_usable()
                due, self._due = self._due, {}
                answered = tuple(due.items())
                known, absent = self._names(), self._processes.absences()
                greeting = Greeting(
                    HERE, self._id, answered=answered, known=known, absent=absent if known else {}
                )
                recipients = [TO_ALL] if len(due) > MOST_SINGLE else map(to_process, due)
                for recipient in recipients:
                    await self._say_until_confirmed(greeting, recipient)
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
        if self._telling is None and self.connection:
            self._telling = start_task(self._tell_absent(), name="channels_rabbitmq absent")

    async def _tell_absent(self) -> None:
        try:
            await asyncio.sleep(random.uniform(SPREAD, 2 * SPREAD))
            ages = self._processes.absences()
            absent = {id_: ages[id_] for id_ in self._found_absent if id_ in ages}
            self._found_absent.clear()
            if absent and len(absent) <= _MOST_NAMES and not self._link.is_blocked:
                body = self._codec.encode_for_channel(
                    TO_ALL, Greeting(ABSENT, self._id, absent=absent).message()
                )
                # Once is enough: who doesn't hear it is told by the next one that asks.
                await self._link.publish(TO_ALL, body, self._loop.time() + _CONFIRM_TIMEOUT)
        except BrokerUnavailable:
            pass
        finally:
            self._telling = None

    def on_absent(self, absent: Mapping[str, float]) -> None:
        """Another process has told so."""
        self._found_absent.difference_update(absent)
        self._processes.on_absent_elsewhere(absent)

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Those that are running."""
        tasks = (self._hello, self._here, self._telling)
        return [task for task in tasks if task is not None and not task.done()]

    def close(self) -> None:
        """Say nothing more."""
        self.on_lost()
        for task in self.tasks:
            task.cancel()
