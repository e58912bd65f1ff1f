"""``Supervisor``: keeps one connection open for ever.

*For each delay of the back-off: connect, set up, serve until lost.* Its ``ConnectionHandler`` knows
what the connection is for. The supervisor's task ends only by ``stop()`` or by being cancelled
(``asyncio.run`` does that at its end). Any ``Exception`` is logged in one line and answered by
another attempt; ``CancelledError`` closes the connection and ends the task.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import carehare

from .._amqp.connection import Connection
from .._amqp.racing import Race
from .._amqp.url import BrokerUrl
from .._futures import Waiters, run_until, start_task
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..statistics import ConnectionStatistics
from .advice import advise
from .host_function import NoUrl, current_urls
from .outage import SHORTEST_DELAY_FOR_CALLS, KnownOutage, Outage
from .url_attempt import UrlAttempt, deadline_of

logger = logging.getLogger("channels_rabbitmq.connection")

# Seconds: the first delay after a loss, and the longest. It is short, since messages are to pass
# within three seconds of the broker's return, and trying a port where nobody listens costs nothing.
# Once it is back, the jitter spreads all processes over a second. 200 of them with 400 connections
# all had theirs after 1.6 s, on two cores (with 10 s: 7.7 s); no attempt failed for the crowd.
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 2.0
# The longest as long as the broker refuses in words: that takes a login, or more, each time, and
# won't pass by itself. And the codes by which it does so (AMQP 0-9-1, section 1.2): access refused,
# not found, resource locked, precondition failed, not allowed. (Others come while it starts.)
_LONGEST_DELAY_IF_REFUSED = 10.0
_REFUSALS = (403, 404, 405, 406, 530)
# Seconds for which the same reason for not connecting isn't logged as a warning again.
_REMINDER_INTERVAL = 60.0

# Characters of an error's text.
_LONGEST_REASON = 1000

_CONNECTION_TROUBLE = (
    OSError,  # ssl.SSLError and TimeoutError among them
    asyncio.TimeoutError,  # until Python 3.10 not a TimeoutError
    carehare.BadBytesFromServer,
    carehare.ChannelClosed,
    carehare.ChannelClosedByServer,
    carehare.ConnectionClosed,
    carehare.ConnectionClosedByHeartbeatMonitor,
    carehare.ConnectionClosedByServer,
)


class State(enum.Enum):
    """Where a supervised connection is in its life."""

    IDLE = "idle"  # nobody asked for it yet
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
        """The connection is set up and whoever waited for it goes on."""

    def on_lost(self, reason: str) -> None:
        """The connection is gone, or its set-up failed."""


def back_off() -> Iterator[float]:
    """Yield delays in seconds, doubling, with jitter so that not all processes come at once.

    They are for a broker that refuses: the caller may shorten them to ``_LONGEST_DELAY``.
    """
    delay = _FIRST_DELAY
    while True:
        yield _with_jitter(delay)
        delay = min(delay * 2, _LONGEST_DELAY_IF_REFUSED)


def _with_jitter(delay: float) -> float:
    return delay * random.uniform(0.5, 1.0)


def _is_refusal(exc: Exception) -> bool:
    """Whether the broker has said no to what was asked of it, or we to it, and would again."""
    return isinstance(exc, ssl.SSLCertVerificationError) or (
        isinstance(exc, (carehare.ConnectionClosedByServer, carehare.ChannelClosedByServer))
        and exc.reply_code in _REFUSALS
    )


def describe(exc: BaseException) -> str:
    """Return one line about an error, without secrets, and of a length that a log can take."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"TLS certificate refused: {exc.verify_message}"
    text = " ".join(str(exc)[:_LONGEST_REASON].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError)) and not text:
        return "timed out"
    if isinstance(exc, _CONNECTION_TROUBLE) and text:
        return text
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


class Supervisor:
    """Owns the task, and the one connection that it keeps open, for a ``ConnectionHandler``."""

    def __init__(
        self,
        handler: ConnectionHandler,
        settings: Settings,
        *,
        id_: str,
        connection_name: str,
        known_outage: KnownOutage,
    ) -> None:
        self.name = f"{handler.name} {id_}"  # in logs
        self._handler = handler
        self._settings = settings
        self._connection_name = connection_name
        self._task: asyncio.Task[None] | None = None
        self._waiters = Waiters()
        self._pause = Waiters()  # the task itself, between two attempts
        self._attempt = Waiters()  # until it is connected, or every URL was tried in vain
        # Ends with a reason when the handler gives the present connection up.
        self._given_up: asyncio.Future[str] | None = None
        self._known_outage = known_outage
        self._outage = Outage(known_outage, handler.name, settings.operation_timeout)
        self._attempted_at = float("-inf")  # loop time
        self._is_retry_due = False  # because a call has failed
        self._refusals = 0  # in words, by how many URLs in the present round of attempts
        self._failed: set[BrokerUrl] = set()  # of those that race, before there was a connection
        # By URL, without its password: why there is no connection to it, as far as that is known.
        self._reasons: dict[str, str] = {}
        self.on_ready: Callable[[], None] = lambda: None
        self.on_over: Callable[[], None] = lambda: None  # who waits, and isn't patient, fails now
        self.on_end: Callable[[], None] = lambda: None  # the task has ended, by whomsoever
        # The event loop was closed under the task, or is garbage: nothing more can be done on it.
        self._is_destroyed = False
        self.cancels_calls = False  # at the end: nobody would look at an exception
        self.connection: Connection | None = None  # while READY
        self.state = State.IDLE
        # Since when it is connected, or isn't; by the wall clock, since it is for people.
        self._since = time.time()
        self._url: BrokerUrl | None = None  # of the connection, while READY
        self._times_connected = 0
        self.last_reason = ""  # why there is no connection, or why the last one was lost

    def __repr__(self) -> str:
        return f"<Supervisor {self.name}: {self.state.value}>"

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
        """Connect, if nobody asked for it before. Must be called on the loop that it serves."""
        if self._task is None and self.state is not State.CLOSED:
            self._set_state(State.CONNECTING)
            delay = 0.0
            failure = self._outage.begin_with_others()
            if failure is not None:
                self._reasons = dict(failure.reasons)
                delay = failure.seen_at + SHORTEST_DELAY_FOR_CALLS - time.monotonic()
            self._task = start_task(
                self._run(delay), name=f"channels_rabbitmq {self._handler.name}"
            )

    async def wait_ready(self, deadline: float, *, patient: bool = False) -> Connection:
        """Return the connection once it is set up.

        Raises BrokerUnavailable, with the reason, if that isn't so by ``deadline`` (loop time), or
        earlier: see ``outage``, also for ``patient``.
        """
        self.start()
        if not self.is_usable:
            await self.read_first()
        # One that has just ended is not noticed yet.
        while self.connection is None or not self.connection.is_open:
            if self.state is State.CLOSED:
                raise self.closed_error()
            is_woken = await self._waiters.wait(self.limit(deadline, patient=patient))
            if not is_woken and self.is_over(deadline, patient=patient):
                raise self.unavailable()
        return self.connection

    @property
    def is_usable(self) -> bool:
        """Whether the connection is open, as far as a loop can know that has not stood still."""
        connection = self.connection
        return connection is not None and connection.is_open and connection.is_fresh

    async def read_first(self) -> None:
        """Find out what has become of the connection if the loop stood still."""
        connection = self.connection
        if connection is not None and connection.is_open and not connection.is_fresh:
            await connection.read_first()

    async def wait_tried(self, deadline: float) -> Connection:
        """As ``wait_ready``, but doesn't wait for a second try: raises BrokerUnavailable then."""
        self.start()
        if self.connection is None and self.state is not State.CLOSED:
            await self._attempt.wait(self.limit(deadline))
        if self.connection is None:
            if self.state is State.CLOSED:
                raise self.closed_error()
            raise self.unavailable()
        return self.connection

    def limit(self, deadline: float, *, patient: bool = False) -> float:
        """Return until when a call waits whose own time ends at ``deadline``: see ``outage``.

        For those who wait for what needs the connection. ``on_over`` tells when it is over early.
        """
        return self._outage.limit(deadline, patient=patient)

    def is_over(self, deadline: float, *, patient: bool = False) -> bool:
        """Whether such a call has waited long enough."""
        return self.limit(deadline, patient=patient) <= asyncio.get_running_loop().time()

    def unavailable(self) -> BrokerUnavailable:
        """Return why such a call fails, and have the next attempt made soon."""
        if not self._is_retry_due:
            self._is_retry_due = True
            self._pause.wake()
        waited = time.time() - self._since
        if not self._reasons and waited >= self._settings.operation_timeout:
            self._note_no_answer()
        reasons = "; ".join(f"{url}: {reason}" for url, reason in self._reasons.items())
        if not reasons:
            reasons = f"{self._settings.host}: still connecting"
        seconds = round(self._outage.seconds)
        lasting = f" for {seconds} s" if seconds else ""
        return BrokerUnavailable(f"No connection to RabbitMQ{lasting}: {reasons}")

    def _note_no_answer(self) -> None:
        """A call's time is over before the first attempt.

        On a loop for this call alone, that attempt ends with it and tells nobody: each call would
        wait its full time.
        """
        self.last_reason = f"no answer within {self._settings.operation_timeout:g} s"
        self._reasons[str(self._settings.host)] = self.last_reason
        self._outage.tell_others(self._reasons)
        self._log_failure(str(self._settings.host))

    def closed_error(self) -> BaseException:
        """Return what a call raises that meets the end."""
        if self.cancels_calls:
            return asyncio.CancelledError()
        return BrokerUnavailable("The channel layer is closed")

    def hurry(self) -> None:
        """Somebody else has reached the broker: if this one waits to try again, it tries now."""
        self._pause.wake()

    def give_up_connection(self, reason: str) -> None:
        """Close the present connection, if there is one, and reconnect."""
        if self._given_up is not None and not self._given_up.done():
            self._given_up.set_result(reason)
            self.connection = None  # from now on, so that wait_ready() waits for the next one
            self._outage.begin()

    def stop(self) -> None:
        """End the task and its connection, in a moment; whoever waits gets BrokerUnavailable."""
        self._set_state(State.CLOSED)
        self._waiters.wake()
        self._attempt.wake()
        if self._task is not None:
            self._task.cancel()

    @property
    def has_stopped(self) -> bool:
        """Whether nothing runs: it has ended, or nobody asked for it yet."""
        return self._task is None or self._task.done()

    async def wait_stopped(self) -> None:
        """Wait until everything has ended after ``stop``: about a second at most."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def _set_state(self, state: State) -> None:
        if state is not self.state and self.state is not State.CLOSED:
            logger.debug("%s: %s -> %s", self.name, self.state.value, state.value)
            if self.state is State.IDLE or state in (State.READY, State.CLOSED):
                self._since = time.time()
            self.state = state

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
                self._waiters.wake()
                self._attempt.wake()
                self.on_end()

    async def _keep_connected(self) -> None:
        delays = back_off()
        delay = 0.0
        while True:
            urls = await self._choose_urls()
            # A success resets, but not one that is over sooner than the last delay: what is set up
            # and refused again and again is no success.
            if await self._try_each(urls) > delay:
                delays = back_off()
            delay = next(delays)
            if self._refusals < max(1, len(urls)):
                delay = min(delay, _with_jitter(_LONGEST_DELAY))
            self._set_state(State.WAITING)
            self._attempt.wake()
            logger.debug("%s: reconnecting in %.1f s: %s", self.name, delay, self.last_reason)
            await self._wait_to_retry(delay)

    async def _choose_urls(self) -> list[BrokerUrl]:
        """Return the URLs to try now, in their order; none if the project's function has none."""
        self._set_state(State.CONNECTING)
        try:
            urls = list(await current_urls(self._settings))
        except NoUrl as err:
            self.last_reason = self._reasons[self._settings.host] = describe(err)
            self._log_failure(self._settings.host)
            return []
        random.shuffle(urls)
        return urls

    async def _try_each(self, urls: list[BrokerUrl]) -> float:
        """Make an attempt at each URL until one succeeds; return, when that is lost, its seconds.

        Returns 0 if none succeeds.
        """
        loop = asyncio.get_running_loop()
        self._attempted_at = loop.time()
        self._refusals = 0
        if urls:
            shown = set(map(str, urls))
            self._reasons = {url: why for url, why in self._reasons.items() if url in shown}
        begun_at = loop.time()
        while urls:
            attempt = await self._reach_one(urls)
            if attempt is None:
                break
            if await self._set_up_and_serve(attempt):
                return loop.time() - begun_at
            urls = [url for url in urls if url != attempt.url and url not in self._failed]
        self._outage.note_failure(self._reasons, is_refusal=self._refusals > 0)
        if self.is_over(math.inf):
            self._waiters.wake()
            self.on_over()
        return 0.0

    async def _wait_to_retry(self, delay: float) -> None:
        """Wait between two attempts: ``delay`` seconds, or less if a call fails meanwhile."""
        until = asyncio.get_running_loop().time() + delay
        if not self._is_retry_due:
            await self._pause.wait(until)
        if self._is_retry_due:
            await self._pause.wait(min(until, self._attempted_at + SHORTEST_DELAY_FOR_CALLS))
            self._is_retry_due = False

    async def _reach_one(self, urls: list[BrokerUrl]) -> UrlAttempt | None:
        """Connect to the URL that is the first to let us in; None if none does."""
        self._set_state(State.CONNECTING)
        self._failed.clear()
        attempts = [self._make_attempt(url) for url in urls]
        try:
            return await Race(attempts).run(deadline_of(attempts))
        except asyncio.CancelledError:
            self.last_reason = "closed on this side"
            self._set_state(State.CLOSED)
            self._tell_lost()
            raise
        except Exception:  # Each has told its own.
            return None

    def _make_attempt(self, url: BrokerUrl) -> UrlAttempt:
        connection = Connection(
            url, ssl_context=self._settings.ssl_context, connection_name=self._connection_name
        )
        timeout = url.connection_timeout or self._settings.connect_timeout
        return UrlAttempt(url, connection, timeout, on_failure=self._on_failure)

    def _on_failure(self, attempt: UrlAttempt, err: Exception) -> None:
        """An attempt has failed before there was a connection."""
        self._failed.add(attempt.url)
        self._note_reason(attempt, err)
        self._tell_lost()
        self._log_failure(str(attempt.url))

    def _note_reason(self, attempt: UrlAttempt, err: Exception) -> None:
        url = attempt.url
        self.last_reason = describe(err)
        if isinstance(err, (TimeoutError, asyncio.TimeoutError)):
            if not str(err):
                self.last_reason = f"no answer from {url} within {attempt.timeout:g} s"
        elif isinstance(err, _CONNECTION_TROUBLE):
            advice = advise(err, url)
            if advice:
                self.last_reason += f" ({advice})"
            self._refusals += _is_refusal(err)
        else:
            # Not expected, so with its traceback; and survived all the same.
            logger.error("%s: unexpected error", self.name, exc_info=err)
        self._reasons[str(url)] = self.last_reason

    async def _set_up_and_serve(self, attempt: UrlAttempt) -> bool:
        """Return True, when the connection is lost, if it could be set up."""
        url, connection = attempt.url, attempt.connection
        self._given_up = asyncio.get_running_loop().create_future()
        was_ready = False
        try:
            await run_until(attempt.deadline, self._set_up(connection))
            if self._given_up.done():  # while it was set up, or in the turn since
                raise carehare.ConnectionClosed(self._given_up.result())
            was_ready = True
            self.connection = connection
            self._url = url
            self._times_connected += 1
            self._set_state(State.READY)
            self._log_connected(url)
            self._outage.end()
            self._reasons.clear()
            self._handler.on_ready()
            self._waiters.wake()
            self._attempt.wake()
            self.on_ready()
            self.last_reason = await self._serve(connection, self._given_up)
            self._reasons[str(url)] = self.last_reason
        except (asyncio.CancelledError, GeneratorExit) as err:
            self._is_destroyed = isinstance(err, GeneratorExit)
            self.last_reason = "closed on this side"
            self._set_state(State.CLOSED)
            raise
        except Exception as err:
            self._note_reason(attempt, err)
        finally:
            self.connection = self._url = None
            self._given_up = None
            if was_ready and self.state is not State.CLOSED:
                self._since = time.time()
                self._outage.begin()
            if self._is_destroyed:
                connection.abort()
            else:
                self._tell_lost()
                if self.state is not State.CLOSED:
                    self._log_loss(url, was_ready)
                await connection.close()
        return was_ready

    async def _serve(self, connection: Connection, given_up: asyncio.Future[str]) -> str:
        """Wait until the connection is lost or given up; return why."""
        futures: list[asyncio.Future[Any]] = [connection.ended, given_up]
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if given_up.done():
            return given_up.result()
        exc = connection.ended.result()
        if exc is None:
            return "closed on this side"
        if not isinstance(exc, _CONNECTION_TROUBLE):
            logger.error("%s: unexpected error", self.name, exc_info=exc)
        return describe(exc)

    def _tell_lost(self) -> None:
        try:
            self._handler.on_lost(self.last_reason)
        except Exception:
            logger.exception("%s: unexpected error", self.name)

    async def _set_up(self, connection: Connection) -> None:
        try:
            await self._handler.set_up(connection)
        except Exception:
            # If the connection has ended, its own reason says more than "connection closed".
            if connection.ended.done() and (exc := connection.ended.result()) is not None:
                raise exc from None
            raise

    def _log_connected(self, url: BrokerUrl) -> None:
        """Tell the end of an outage as loudly as its beginning was told."""
        seconds = self._outage.seconds
        if self._times_connected > 1:
            logger.warning("%s: connected again to %s after %.1f s", self.name, url, seconds)
        elif self.last_reason:
            logger.warning("%s: connected to %s after %.1f s", self.name, url, seconds)
        else:
            logger.info("%s: connected to %s", self.name, url)

    def _log_loss(self, url: BrokerUrl, was_ready: bool) -> None:
        if was_ready:
            logger.warning("%s: lost the connection to %s: %s", self.name, url, self.last_reason)
        else:
            self._log_failure(str(url))

    def _log_failure(self, url: str) -> None:
        """Warn of an attempt that failed only when there is news, or now and then."""
        # Whatever number it holds: each attempt's queue has another one in its name.
        news = (self._handler.name, url, re.sub(r"\d+", "0", self.last_reason))
        if self._known_outage.is_news(news, _REMINDER_INTERVAL):
            logger.warning("%s: cannot connect to %s: %s", self.name, url, self.last_reason)
