"""Calls from one event loop that another one, in another thread, has to serve.

A forwarded call has two halves: a future on the caller's loop, and a task on the loop of the
``LoopLayer`` that serves it, the *owner's*. They talk by ``call_soon_threadsafe`` only. So nothing
here takes a lock, and what one half says to the other arrives in order. ::

    caller's loop                        owner's loop
      start   ------------------------->   runs the call in a task
      returns or raises  <--------------   answers
      if cancelled   ------------------>   cancels the task

**Receiving** takes a step more, since a caller that is cancelled must have taken nothing. The
router *hands over* the message, and the owner's half answers with it. When the caller returns it,
the caller's half says so: the message is *accepted*. If the caller is cancelled, before or after
the answer has come, the caller's half says that, and the owner's half has the message *requeued*.

**Ends.** Either loop may end meanwhile. If the caller's loop is closed, the caller's half says
"cancelled" when its coroutine is destroyed. If the owner's loop ends, it cancels the owner's half,
which answers with an error. If the owner's loop is only closed, nothing answers: so the caller's
half looks at it now and then. A call that doesn't wait for a message has a limit in time, too.

(``asyncio.run_coroutine_threadsafe`` isn't simpler, even for the other calls. If the owner's loop
is closed, cancelling its future logs a traceback of ``concurrent.futures``, on Python 3.11 and
3.13, and nothing tells the caller.)
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from channels.exceptions import StopConsumer

from .._futures import look_at, resolve
from ..exceptions import BrokerUnavailable

# Seconds between two looks at whether the owner's loop was closed.
WATCH_INTERVAL = 1.0
# Seconds that the owner's loop gets to ack a message of a normal channel.
ACK_TIMEOUT = 1.0


class Call:
    """One forwarded call: ``make()``, on the owner's loop, returns the coroutine to run.

    If it isn't ``cancellable`` it runs to its end, also when the caller is cancelled.
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
        # The result and the exception. (asyncio would log an exception that was set as such, and
        # which a caller who is cancelled in this moment doesn't fetch.)
        self._answer: asyncio.Future[tuple[Any, Exception | None]] = self._caller.create_future()
        self._task: asyncio.Task[None] | None = None
        self._is_cancelled = False  # as the owner's half knows
        self._deadline: float | None = None  # the caller's loop time
        self._timer: asyncio.TimerHandle | None = None

    # The caller's half

    async def run(self, timeout: float | None) -> Any:
        """Return or raise what the owner's half does; BrokerUnavailable after ``timeout`` seconds.

        If the exception's text says "is busy" or "has ended", the call may or may not have run.
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
            self._notify_owner(self._on_cancelled)
            raise
        finally:
            exc = None  # breaks the cycle of an exception, its traceback and this frame
            if self._timer is not None:
                self._timer.cancel()
        self._on_return()
        return result

    def _watch(self) -> None:
        """Look now and then whether an answer may still come."""
        now = self._caller.time()
        if self._owner.is_closed():
            # It has not cancelled its tasks, as asyncio.run() does.
            self._set_answer(None, self._owner_ended())
        elif self._deadline is not None and now >= self._deadline:
            error = BrokerUnavailable("The event loop that serves this call is busy")
            self._set_answer(None, error)
        else:
            at = now + WATCH_INTERVAL
            if self._deadline is not None:
                at = min(at, self._deadline)
            self._timer = self._caller.call_at(at, self._watch)

    def _owner_ended(self) -> Exception:
        return BrokerUnavailable("The event loop that served this call has ended")

    def _on_return(self) -> None:
        """The caller returns now."""

    def _set_answer(self, result: Any, exc: Exception | None) -> None:
        resolve(self._answer, (result, exc))

    def _notify_owner(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the owner's loop is closed
            self._owner.call_soon_threadsafe(callback)

    # The owner's half

    def _start(self) -> None:
        self._task = self._owner.create_task(self._run(), name="channels_rabbitmq forwarded call")

    async def _run(self) -> None:
        try:
            result = await self._make()
        except Exception as err:
            self._reply(None, err)
        except BaseException:  # The caller was cancelled, or this loop ends.
            self._reply(None, self._owner_ended())
            raise
        else:
            self._reply(result, None)

    def _reply(self, result: Any, exc: Exception | None) -> bool:
        """Answer the caller; False if the caller can't hear it any more."""
        if self._is_cancelled:
            return False
        try:
            self._caller.call_soon_threadsafe(self._set_answer, result, exc)
        except RuntimeError:  # the caller's loop is closed
            return False
        return True

    def _on_cancelled(self) -> None:
        """The caller doesn't wait any more."""
        self._is_cancelled = True
        if self._task is not None and self._is_cancellable:
            self._task.cancel()


class _Source(Protocol):
    """What hands messages over, on the owner's loop: a ``LoopLayer``, or a part of it."""

    def hand_over(self, channel: str) -> Coroutine[Any, Any, Any]: ...

    def accept(self, handed_over: Any) -> bool:
        """The receiver takes the message; False if it can't have it any more."""

    def requeue(self, handed_over: Any) -> None: ...


class ReceiveCall(Call):
    """A forwarded ``receive()``: see the module."""

    def __init__(
        self, owner: asyncio.AbstractEventLoop, get_source: Callable[[], _Source], channel: str
    ) -> None:
        super().__init__(owner, self._hand_over)
        self._get_source = get_source
        self._channel = channel
        self._source: _Source | None = None
        self._handed_over: Any = None
        self.is_accepted = False  # as the owner's half knows
        self._caller_task = asyncio.current_task()

    # The caller's half

    def _owner_ended(self) -> Exception:
        return StopConsumer()  # To a receiver it is the end of the layer.

    def refuse(self) -> None:
        """End the call, for a caller whose process ends. From any thread."""
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed
            self._caller.call_soon_threadsafe(self._on_refused)

    def _on_refused(self) -> None:
        self._set_answer(None, StopConsumer())
        if self._caller_task is not None:
            # Perhaps nobody awaits the task any more, and asyncio would print the exception.
            self._caller_task.add_done_callback(look_at)

    def _on_return(self) -> None:
        self._notify_owner(self._on_accepted)

    # The owner's half

    async def _hand_over(self) -> Any:
        self._source = self._get_source()
        try:
            self._handed_over = await self._source.hand_over(self._channel)
        except asyncio.CancelledError:
            # To a receiver the end of the owner's loop is the end of the layer.
            if self._is_cancelled:
                raise
            raise StopConsumer from None
        return self._handed_over.message()

    def _reply(self, result: Any, exc: Exception | None) -> bool:
        is_told = super()._reply(result, exc)
        if not is_told:
            self._requeue()
        return is_told

    def _on_accepted(self) -> None:
        handed_over, self._handed_over = self._handed_over, None
        if handed_over is not None:
            assert self._source is not None
            self.is_accepted = self._source.accept(handed_over)

    def _requeue(self) -> None:
        handed_over, self._handed_over = self._handed_over, None
        if handed_over is not None:
            assert self._source is not None
            self._source.requeue(handed_over)

    def _on_cancelled(self) -> None:
        super()._on_cancelled()
        self._requeue()


class NormalReceiveCall(ReceiveCall):
    """A forwarded ``receive()`` from a normal channel: it returns when the ack has left.

    Otherwise the caller could die of the message before that, and the next process get it, too. The
    caller must not be cancelled between the ack and its return. So its thread stands still until
    the owner's half has answered, for about 0.1 ms: its event loop was made for this call.
    """

    def __init__(
        self, owner: asyncio.AbstractEventLoop, get_source: Callable[[], _Source], channel: str
    ) -> None:
        super().__init__(owner, get_source, channel)
        self._is_answered = threading.Event()

    def _on_return(self) -> None:
        super()._on_return()
        if not self._is_answered.wait(ACK_TIMEOUT):
            # It is busy, and will ack.
            self.is_accepted = not self._owner.is_closed()

    def _on_accepted(self) -> None:
        super()._on_accepted()
        self._is_answered.set()


class SyncReceivers:
    """The calls of ``receive()`` on event loops of ``async_to_sync``.

    Such a loop runs in a thread of an executor. When the interpreter begins to end, it waits for
    these threads, even if a daemon thread has called or the caller was interrupted. So these calls
    are refused then.
    """

    def __init__(self) -> None:
        self._calls: set[ReceiveCall] = set()
        self._are_refused = False

    def add(self, call: ReceiveCall) -> None:
        """Note a call, or end it at once."""
        self._calls.add(call)
        if self._are_refused:
            call.refuse()

    def discard(self, call: ReceiveCall) -> None:
        """Forget a call that has ended."""
        self._calls.discard(call)

    def refuse(self) -> None:
        """End the calls that wait, and all later ones."""
        self._are_refused = True
        for call in list(self._calls):
            call.refuse()
