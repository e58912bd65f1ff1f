"""``Supervisor``: keeps one connection open for ever, and has calls wait for it.

*For each delay of the back-off: connect, set up, serve until lost.* Its ``ConnectionHandler`` knows
what the connection is for. The supervisor's task ends only by ``close()`` or by being cancelled
(``asyncio.run`` does that at its end). Any ``Exception`` is logged in one line and answered by
another attempt; ``CancelledError`` closes the connection and ends the task.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import carehare

from .._amqp.connection import Connection
from .._amqp.url import BrokerUrl
from .._futures import Waiters, run_until, start_task
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..statistics import ConnectionStatistics
from .back_off import BackOff
from .connector import Connector, UrlAttempt, connection_name
from .outage import SHORTEST_DELAY_FOR_CALLS, Outage
from .reasons import Reasons, describe, is_trouble
from .shared import Shared

logger = logging.getLogger("channels_rabbitmq.connection")

_CLOSED_HERE = "closed on this side"


class State(enum.Enum):
    """Where a supervised connection is in its life."""

    IDLE = "idle"  # No call needed it yet.
    CONNECTING = "connecting"
    READY = "connected"
    WAITING = "waiting"  # for the next attempt
    CLOSED = "closed"


class ConnectionHandler(Protocol):
    """What a supervised connection is for."""

    name: str  # in logs and in RabbitMQ's list of connections

    async def set_up(self, connection: Connection) -> None:
        """Prepare a fresh connection; an exception means another attempt."""

    def on_ready(self) -> None:
        """The connection is set up; the calls that wait for it go on right afterwards."""

    def on_lost(self, reason: str) -> None:
        """The connection is gone, or its set-up failed."""


class Supervisor:
    """Owns the task, and the one connection that it keeps open, for a ``ConnectionHandler``."""

    def __init__(
        self,
        handler: ConnectionHandler,
        settings: Settings,
        *,
        id_: str,
        shared: Shared,
    ) -> None:
        self.name = f"{handler.name} {id_}"  # in logs
        self._handler = handler
        self._settings = settings
        self._reasons = Reasons(self.name, handler.name, shared.told)
        name = connection_name(handler.name, id_)
        self._connector = Connector(settings, name, self._reasons, self._call_on_lost)
        self._back_off = BackOff()
        self._outage = Outage(shared.outage, handler.name, settings.operation_timeout)
        self._task: asyncio.Task[None] | None = None
        self._waiters = Waiters()  # until it is connected, or calls that aren't patient fail
        self._round = Waiters()  # until it is connected, or every URL was tried in vain
        # Ends with a reason when the present connection is given up.
        self._given_up: asyncio.Future[str] | None = None
        self.on_ready: Callable[[], None] = lambda: None
        # Calls that aren't patient fail now.
        self.on_limit_passed: Callable[[], None] = lambda: None
        self.on_closed: Callable[[], None] = lambda: None  # The task has ended, for any reason.
        # The event loop was closed under the task, or is garbage: nothing can be awaited any more.
        self._is_destroyed = False
        self.cancels_calls = False  # at the end, when nothing would look at an exception
        self.connection: Connection | None = None  # while READY
        self.state = State.IDLE
        # Since when it is connected, or isn't; by the wall clock, since it is for people.
        self._since = time.time()
        self._url: BrokerUrl | None = None  # of the connection, while READY
        self._times_connected = 0

    def __repr__(self) -> str:
        return f"<Supervisor {self.name}: {self.state.value}>"

    @property
    def last_reason(self) -> str:
        """Why there is no connection, or why the last one was lost."""
        return self._reasons.last

    def statistics(self) -> ConnectionStatistics:
        """Tell how it is. From any thread."""
        url = self._url
        state = self.state
        if state is State.READY and url is None:
            state = State.WAITING  # in a moment
        return ConnectionStatistics(
            state=state.value,
            since=self._since,
            url="" if url is None else str(url),
            reconnects=max(0, self._times_connected - 1),
            last_reason=self.last_reason,
        )

    def start(self) -> None:
        """Connect, unless a call has asked for it before. Call it on the loop that it serves."""
        if self._task is None and self.state is not State.CLOSED:
            self._set_state(State.CONNECTING)
            delay = 0.0
            failure = self._outage.begin_with_others()
            if failure is not None:
                self._reasons.by_url = dict(failure.reasons)
                delay = failure.seen_at + SHORTEST_DELAY_FOR_CALLS - time.monotonic()
            name = f"channels_rabbitmq {self._handler.name}"
            self._task = start_task(self._run(delay), name=name)

    # For calls

    async def wait_ready(self, deadline: float, *, patient: bool = False) -> Connection:
        """Return the connection once it is set up.

        Raises BrokerUnavailable, with the reason, if that isn't so by ``deadline`` (loop time), or
        earlier: see ``outage``, also for ``patient``.
        """
        self.start()
        if not self.is_usable:
            await self.read_first()
        # The connection may have ended just now, and the supervisor's task not know it yet.
        while self.connection is None or not self.connection.is_open:
            if self.state is State.CLOSED:
                raise self.closed_error()
            is_woken = await self._waiters.wait(self.limit(deadline, patient=patient))
            if not is_woken and self.is_past_limit(deadline, patient=patient):
                raise self.unavailable()
        return self.connection

    @property
    def is_usable(self) -> bool:
        """Whether the connection is open, as far as a loop can know that has not stood still."""
        connection = self.connection
        return connection is not None and connection.is_usable()

    async def read_first(self) -> None:
        """Find out what has become of the connection if the loop stood still."""
        connection = self.connection
        if connection is not None and connection.is_open and not connection.is_usable():
            await connection.read_first()

    async def wait_tried(self, deadline: float) -> Connection:
        """As ``wait_ready``, but raises BrokerUnavailable as soon as one round was in vain."""
        self.start()
        if self.connection is None and self.state is not State.CLOSED:
            await self._round.wait(self.limit(deadline))
        if self.connection is None:
            if self.state is State.CLOSED:
                raise self.closed_error()
            raise self.unavailable()
        return self.connection

    def limit(self, deadline: float, *, patient: bool = False) -> float:
        """Return until when a call waits whose own time ends at ``deadline``: see ``outage``.

        For calls that wait for something that needs the connection. ``on_limit_passed`` is called
        when the limit has become earlier, and is past.
        """
        return self._outage.limit(deadline, patient=patient)

    def is_past_limit(self, deadline: float, *, patient: bool = False) -> bool:
        """Whether a call with this deadline has waited long enough."""
        return self.limit(deadline, patient=patient) <= asyncio.get_running_loop().time()

    def unavailable(self) -> BrokerUnavailable:
        """Return why such a call fails, and have the next attempt made soon."""
        self._back_off.retry_soon()
        waited = time.time() - self._since
        if not self._reasons.by_url and waited >= self._settings.operation_timeout:
            self._note_no_answer()
        reasons = str(self._reasons) or f"{self._settings.host}: still connecting"
        seconds = round(self._outage.seconds)
        lasting = f" for {seconds} s" if seconds else ""
        return BrokerUnavailable(f"No connection to RabbitMQ{lasting}: {reasons}")

    def _note_no_answer(self) -> None:
        """Note that a call's time is over before the first attempt.

        On an event loop that exists for this call alone, the attempt ends with the loop and leaves
        no reason. Without this note each such call would wait its full time.
        """
        host = str(self._settings.host)
        self._reasons.note(host, f"no answer within {self._settings.operation_timeout:g} s")
        self._outage.share_failure(self._reasons.by_url)
        self._reasons.log_failure(host)

    def closed_error(self) -> BaseException:
        """Return what a call raises when the supervisor is closed."""
        if self.cancels_calls:
            return asyncio.CancelledError()
        return BrokerUnavailable("The channel layer is closed")

    def retry_now(self) -> None:
        """Try again now: another connection has reached the broker."""
        self._back_off.retry_now()

    # The end

    def reconnect(self, reason: str) -> None:
        """Close the present connection, if there is one, and reconnect."""
        if self._given_up is not None and not self._given_up.done():
            self._given_up.set_result(reason)
            self.connection = None  # from now on, so that wait_ready() waits for the next one
            self._outage.begin()

    def close(self) -> None:
        """End the task and its connection in a moment; calls that wait get BrokerUnavailable."""
        self._set_state(State.CLOSED)
        self._wake_calls()
        if self._task is not None:
            self._task.cancel()

    @property
    def is_running(self) -> bool:
        """Whether the task was started and hasn't ended."""
        return self._task is not None and not self._task.done()

    async def wait_closed(self) -> None:
        """Wait until everything has ended after ``close``: about a second at most."""
        if self._task is not None:
            await asyncio.wait([self._task])

    # The task

    def _set_state(self, state: State) -> None:
        if state is not self.state and self.state is not State.CLOSED:
            logger.debug("%s: %s -> %s", self.name, self.state.value, state.value)
            if self.state is State.IDLE or state in (State.READY, State.CLOSED):
                self._since = time.time()
            self.state = state

    def _wake_calls(self) -> None:
        self._waiters.wake()
        self._round.wake()

    async def _run(self, delay: float) -> None:
        try:
            if delay > 0:
                await asyncio.sleep(delay)
            await self._keep_connected()
        except GeneratorExit:
            self._is_destroyed = True
            raise
        finally:
            self._set_state(State.CLOSED)
            if not self._is_destroyed:
                self._wake_calls()
                self.on_closed()

    async def _keep_connected(self) -> None:
        while True:
            seconds = await self._try_each_url()
            delay = self._back_off.next_delay(
                connected_for=seconds, is_refused=self._connector.is_refused
            )
            self._set_state(State.WAITING)
            self._round.wake()
            logger.debug("%s: reconnecting in %.1f s: %s", self.name, delay, self.last_reason)
            await self._back_off.wait()

    async def _try_each_url(self) -> float:
        """Try every URL until one succeeds, and serve until its connection is lost.

        Returns how many seconds that took, or 0 if none has succeeded.
        """
        self._set_state(State.CONNECTING)
        await self._connector.begin_round()
        loop = asyncio.get_running_loop()
        begun_at = loop.time()
        self._back_off.on_attempt()
        while (attempt := await self._connect()) is not None:
            if await self._set_up_and_serve(attempt):
                return loop.time() - begun_at
        self._outage.note_failure(self._reasons.by_url, is_refusal=self._connector.has_refusals)
        if self.is_past_limit(math.inf):
            self._waiters.wake()
            self.on_limit_passed()
        return 0.0

    async def _connect(self) -> UrlAttempt | None:
        try:
            return await self._connector.connect()
        except asyncio.CancelledError:
            self._on_cancelled()
            self._call_on_lost()
            raise

    async def _set_up_and_serve(self, attempt: UrlAttempt) -> bool:
        """Return True, when the connection is lost, if it could be set up."""
        connection = attempt.connection
        self._given_up = asyncio.get_running_loop().create_future()
        was_ready = False
        try:
            await run_until(attempt.deadline, self._set_up(connection))
            if self._given_up.done():  # while it was set up, or in the turn since
                raise carehare.ConnectionClosed(self._given_up.result())
            was_ready = True
            self._on_set_up(attempt)
            reason = await self._serve(connection, self._given_up)
            self._reasons.note(str(attempt.url), reason)
        except (asyncio.CancelledError, GeneratorExit) as err:
            self._is_destroyed = isinstance(err, GeneratorExit)
            self._on_cancelled()
            raise
        except Exception as err:
            self._connector.note_failure(attempt, err)
        finally:
            self._on_disconnected(attempt.url, was_ready)
            if self._is_destroyed:
                connection.abort()
            else:
                await connection.close()
        return was_ready

    async def _set_up(self, connection: Connection) -> None:
        try:
            await self._handler.set_up(connection)
        except Exception:
            # If the connection has ended, its own reason says more than "connection closed".
            if connection.closed.done() and (exc := connection.closed.result()) is not None:
                raise exc from None
            raise

    def _on_set_up(self, attempt: UrlAttempt) -> None:
        self.connection = attempt.connection
        self._url = attempt.url
        self._times_connected += 1
        self._set_state(State.READY)
        self._reasons.log_connected(
            str(attempt.url), self._outage.seconds, again=self._times_connected > 1
        )
        self._outage.end()
        self._reasons.by_url.clear()
        self._handler.on_ready()
        self._wake_calls()
        self.on_ready()

    async def _serve(self, connection: Connection, given_up: asyncio.Future[str]) -> str:
        """Wait until the connection is lost or given up; return why."""
        futures: list[asyncio.Future[Any]] = [connection.closed, given_up]
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if given_up.done():
            return given_up.result()
        exc = connection.closed.result()
        if exc is None:
            return _CLOSED_HERE
        if not is_trouble(exc):
            self._reasons.log_unexpected(exc)
        return describe(exc)

    def _on_cancelled(self) -> None:
        self._reasons.last = _CLOSED_HERE
        self._set_state(State.CLOSED)

    def _on_disconnected(self, url: BrokerUrl, was_ready: bool) -> None:
        self.connection = self._url = self._given_up = None
        is_closed = self.state is State.CLOSED
        if was_ready and not is_closed:
            self._since = time.time()
            self._outage.begin()
        if self._is_destroyed:
            return
        self._call_on_lost()
        if was_ready and not is_closed:
            self._reasons.log_loss(str(url))
        elif not is_closed:
            self._reasons.log_failure(str(url))

    def _call_on_lost(self) -> None:
        try:
            self._handler.on_lost(self.last_reason)
        except Exception as err:
            self._reasons.log_unexpected(err)
