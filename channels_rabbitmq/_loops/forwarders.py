"""Calls from one event loop that another one, in another thread, has to serve.

A forwarded call has two halves: a future on the caller's loop, and a task on the loop of the
``LoopLayer`` that serves it. They know of each other by ``call_soon_threadsafe`` only, so nothing
here takes a lock, and what one says to the other arrives in order. ::

    caller's loop                        owner's loop
      start   ------------------------->   runs the call in a task
      returns or raises  <--------------   answers
      if cancelled   ------------------>   cancels the task

**Receiving** takes a step more, since a caller that is cancelled must have taken nothing. The
router *hands over* the message, and the owner's half answers with it. The caller accepts it in the
moment in which it returns, and says so; or it is cancelled, before or after the answer has come,
and says that. The owner's half then has the message requeued.

Either loop may end meanwhile. A caller whose loop is closed under it says "cancelled" when its
coroutine is destroyed. An owner's half that its loop's end cancels answers with an error. And a
call that doesn't wait for a message has a limit in time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import carehare
from channels.exceptions import StopConsumer

from .._broker.outage import KnownOutage
from .._broker.user_connection import UserConnection
from .._futures import look_at
from .._identity import new_id
from .._inbox.router import HandedOver
from .._loop_layer import LoopLayer
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable

# Seconds that a call may take beyond its own limit, since the owner's loop may be busy.
_GRACE = 5.0
# Seconds between two looks at whether the owner's loop was closed.
_WATCH_INTERVAL = 1.0


class Call:
    """One forwarded call: ``make()``, on the owner's loop, returns the coroutine to run.

    If it isn't ``cancellable`` it runs to its end, also when the caller doesn't wait for that.
    """

    def __init__(
        self,
        owner: asyncio.AbstractEventLoop,
        make: Callable[[], Coroutine[Any, Any, Any]],
        *,
        cancellable: bool = True,
    ) -> None:
        self._owner = owner
        self._make = make
        self._is_cancellable = cancellable
        self._caller = asyncio.get_running_loop()
        # The result and the exception. (One that was set as such, and which a caller who is
        # cancelled in this moment doesn't fetch, would be logged as never retrieved.)
        self._answer: asyncio.Future[tuple[Any, Exception | None]] = self._caller.create_future()
        self._task: asyncio.Task[None] | None = None
        self._is_cancelled = False  # as the owner's half knows
        self._deadline: float | None = None  # the caller's loop time
        self._timer: asyncio.TimerHandle | None = None

    # The caller's half

    async def run(self, timeout: float | None) -> Any:
        """Return or raise what the owner's half does; BrokerUnavailable after ``timeout``.

        Of an exception with "is busy" or "has ended" in its text one can't tell how far the owner's
        half had come.
        """
        try:
            self._owner.call_soon_threadsafe(self._start)
        except RuntimeError:
            raise BrokerUnavailable("The event loop that serves this call has ended") from None
        self._deadline = None if timeout is None else self._caller.time() + timeout
        self._watch()
        try:
            result, exc = await self._answer
            if exc is not None:
                raise exc
        except BaseException:
            self._tell_owner(self._cancel)
            raise
        finally:
            exc = None  # breaks the cycle of an exception, its traceback and this frame
            if self._timer is not None:
                self._timer.cancel()
        self._accept()
        return result

    def _watch(self) -> None:
        """Look now and then whether an answer may still come."""
        now = self._caller.time()
        if self._owner.is_closed():
            # Without having cancelled its tasks; asyncio.run() does that.
            self._settle(None, self._owner_ended())
        elif self._deadline is not None and now >= self._deadline:
            self._settle(None, BrokerUnavailable("The event loop that serves this call is busy"))
        else:
            at = now + _WATCH_INTERVAL
            if self._deadline is not None:
                at = min(at, self._deadline)
            self._timer = self._caller.call_at(at, self._watch)

    def _owner_ended(self) -> Exception:
        return BrokerUnavailable("The event loop that served this call has ended")

    def _accept(self) -> None:
        """The caller returns now."""

    def _settle(self, result: Any, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_result((result, exc))

    def _tell_owner(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the owner's loop is closed
            self._owner.call_soon_threadsafe(callback)

    # The owner's half

    def _start(self) -> None:
        self._task = self._owner.create_task(self._run(), name="channels_rabbitmq forwarded call")

    async def _run(self) -> None:
        try:
            result = await self._make()
        except Exception as err:
            self._say(None, err)
        except BaseException:  # The caller has cancelled, or this loop ends.
            self._say(None, self._owner_ended())
            raise
        else:
            self._say(result, None)

    def _say(self, result: Any, exc: Exception | None) -> bool:
        """Answer; False if nobody can hear it any more."""
        if self._is_cancelled:
            return False
        try:
            self._caller.call_soon_threadsafe(self._settle, result, exc)
        except RuntimeError:  # the caller's loop is closed
            return False
        return True

    def _cancel(self) -> None:
        """The caller doesn't wait any more."""
        self._is_cancelled = True
        if self._task is not None and self._is_cancellable:
            self._task.cancel()


class ReceiveCall(Call):
    """A forwarded ``receive()``: see the module."""

    def __init__(
        self, owner: asyncio.AbstractEventLoop, make: Callable[[], LoopLayer], channel: str
    ) -> None:
        super().__init__(owner, self._hand_over)
        self._make_loop_layer = make
        self._channel = channel
        self._loop_layer: LoopLayer | None = None
        self._handed_over: HandedOver | None = None
        self._caller_task = asyncio.current_task()

    # The caller's half

    def _owner_ended(self) -> Exception:
        return StopConsumer()  # To a receiver it is the end of the layer.

    def refuse(self) -> None:
        """End the call, for a caller whose process ends. From any thread."""
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed
            self._caller.call_soon_threadsafe(self._accept_refusal)

    def _accept_refusal(self) -> None:
        self._settle(None, StopConsumer())
        if self._caller_task is not None:
            # Perhaps nobody looks at it any more, and asyncio would print that.
            self._caller_task.add_done_callback(look_at)

    def _accept(self) -> None:
        self._tell_owner(self._on_accepted)

    # The owner's half

    async def _hand_over(self) -> Any:
        self._loop_layer = self._make_loop_layer()
        try:
            self._handed_over = await self._loop_layer.hand_over(self._channel)
        except asyncio.CancelledError:
            # To a receiver the end of the owner's loop is the end of the layer.
            if self._is_cancelled:
                raise
            raise StopConsumer from None
        return self._handed_over.message()

    def _say(self, result: Any, exc: Exception | None) -> bool:
        is_told = super()._say(result, exc)
        if not is_told:
            self._requeue()
        return is_told

    def _on_accepted(self) -> None:
        handed_over, self._handed_over = self._handed_over, None
        if handed_over is not None:
            assert self._loop_layer is not None
            self._loop_layer.accept(handed_over)

    def _requeue(self) -> None:
        handed_over, self._handed_over = self._handed_over, None
        if handed_over is not None:
            assert self._loop_layer is not None
            self._loop_layer.requeue(handed_over)

    def _cancel(self) -> None:
        super()._cancel()
        self._requeue()


class SyncReceivers:
    """The calls of ``receive()`` on event loops of ``async_to_sync``.

    Such a loop runs in a thread of an executor's, and when the interpreter begins to end it waits
    for these threads, even if it was a daemon thread that called, or if the caller was interrupted.
    So they are refused then.
    """

    def __init__(self) -> None:
        self._calls: set[ReceiveCall] = set()
        self._are_refused = False

    def add(self, call: ReceiveCall) -> None:
        self._calls.add(call)
        if self._are_refused:
            call.refuse()

    def discard(self, call: ReceiveCall) -> None:
        self._calls.discard(call)

    def refuse(self) -> None:
        """End those that wait, and those that come."""
        self._are_refused = True
        for call in list(self._calls):
            call.refuse()


class Forwarder:
    """A ``LoopLayer`` of another event loop, with the methods that callers use.

    ``get_loop_layer()`` is called on that loop. Each method raises what the other does. On an
    event loop of ``async_to_sync`` there are ``sync_receivers`` to note who waits.
    """

    def __init__(
        self,
        owner: asyncio.AbstractEventLoop,
        get_loop_layer: Callable[[], LoopLayer],
        settings: Settings,
        sync_receivers: SyncReceivers | None,
    ) -> None:
        self._owner = owner
        self._get_loop_layer = get_loop_layer
        self._settings = settings
        self._sync_receivers = sync_receivers

    async def _call(
        self, make: Callable[[LoopLayer], Coroutine[Any, Any, Any]], *, cancellable: bool = True
    ) -> Any:
        call = Call(self._owner, lambda: make(self._get_loop_layer()), cancellable=cancellable)
        return await call.run(self._settings.operation_timeout + _GRACE)

    async def send(self, channel: str, body: bytes) -> None:
        await self._call(lambda loop_layer: loop_layer.send(channel, body))

    async def group_send(self, group: str, body: bytes) -> None:
        await self._call(lambda loop_layer: loop_layer.group_send(group, body))

    async def group_add(self, group: str, channel: str) -> None:
        await self._call(lambda loop_layer: loop_layer.group_add(group, channel))

    async def group_discard(self, group: str, channel: str) -> None:
        async def discard(loop_layer: LoopLayer) -> None:
            loop_layer.group_discard(group, channel)

        await self._call(discard)

    async def new_channel(self, prefix: str) -> str:
        async def new_channel(loop_layer: LoopLayer) -> str:
            return loop_layer.new_channel(prefix)

        channel: str = await self._call(new_channel)
        return channel

    async def receive(self, channel: str) -> dict[str, Any]:
        call = ReceiveCall(self._owner, self._get_loop_layer, channel)
        if self._sync_receivers is None:
            message: dict[str, Any] = await call.run(None)
            return message
        self._sync_receivers.add(call)
        try:
            message = await call.run(None)
        finally:
            self._sync_receivers.discard(call)
        return message

    async def connect(self, fail_fast: bool) -> None:
        await self._call(lambda loop_layer: loop_layer.connect(fail_fast))


class SyncForwarder(Forwarder):
    """What an event loop that ``async_to_sync`` made has instead of a ``LoopLayer``.

    ``user_connection`` is the loop's own.
    """

    def __init__(
        self,
        owner: asyncio.AbstractEventLoop,
        get_loop_layer: Callable[[], LoopLayer],
        settings: Settings,
        sync_receivers: SyncReceivers,
        known_outage: KnownOutage,
    ) -> None:
        super().__init__(owner, get_loop_layer, settings, sync_receivers)
        self._known_outage = known_outage
        self._user_connection: UserConnection | None = None
        self._is_closed = False

    async def _call(
        self, make: Callable[[LoopLayer], Coroutine[Any, Any, Any]], *, cancellable: bool = True
    ) -> Any:
        self._require_open()
        return await super()._call(make, cancellable=cancellable)

    def _require_open(self) -> None:
        if self._is_closed:
            raise BrokerUnavailable("The channel layer is closed")

    def receive_nowait(self, channel: str) -> None:
        """Nothing: as for a channel of another event loop."""

    def add_waiter(self, channel: str) -> None:
        """The same."""

    async def user_connection(self) -> carehare.Connection:
        """Return an open connection of this loop's; the loop's end closes it."""
        self._require_open()
        if self._user_connection is None:
            self._user_connection = UserConnection(self._settings, new_id(), self._known_outage)
        deadline = asyncio.get_running_loop().time() + self._settings.operation_timeout
        return await self._user_connection.wait_ready(deadline)

    async def close(self) -> None:
        """Close what serves all loops of sync code, and this one's own connection.

        Those that come later, and those of other threads, start anew; this one can't.
        """
        if self._is_closed:
            return
        if self._user_connection is not None:
            self._user_connection.supervisor.stop()
        closing = super()._call(lambda loop_layer: loop_layer.close(), cancellable=False)
        self._is_closed = True
        await closing
        if self._user_connection is not None:
            await self._user_connection.supervisor.wait_stopped()
