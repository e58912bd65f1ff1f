"""What the layer has on an event loop ends with it, also if somebody only closes the loop.

``asyncio.run`` cancels all tasks before it closes its loop, and the layer's end what they have. But
who makes loops himself often just closes them: pytest-asyncio below 1.1, scripts, Celery tasks.
asyncio then forgets what is scheduled, and no task hears of it. Sockets would stay open, and on the
broker connections and queues, until the garbage collector destroys the tasks; asyncio complains of
each ("Task was destroyed but it is pending", "unclosed transport"), and what the tasks' ``finally``
wants to do fails on a closed loop. Fifty calls, each on a loop of its own, made 2,700 lines.

asyncio tells nobody that a loop is closed. So the ``close`` of a loop that uses the layer is
wrapped, on that one object: the loop runs for a moment more, before it is closed, in which the
layer ends as at the end of the process. That takes the broker's answer to a goodbye, 2 ms, or a
second if it doesn't answer. If nothing of the layer is open, ``close`` only closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable

from .._loop_layer import LoopLayer


def end_before_close(loop_layer: LoopLayer, is_ours: Callable[[], bool]) -> None:
    """Have the ``close`` of its event loop end what a ``LoopLayer`` has, if ``is_ours()`` then.

    (Not in the child of a fork, where its sockets are the parent's.)
    """
    loop = loop_layer.loop
    try:
        attributes = vars(loop)
    except TypeError:  # A loop that takes no attributes is seen to be closed at the next use.
        return
    close = attributes.get("close")
    if not isinstance(close, _Close) or close.is_ours != is_ours:
        close = attributes["close"] = _Close(loop, is_ours)
    close.loop_layers.add(loop_layer)


class _Close:
    """The ``close`` of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, is_ours: Callable[[], bool]) -> None:
        self._loop = loop
        self._close = loop.close
        self.is_ours = is_ours
        self.loop_layers: weakref.WeakSet[LoopLayer] = weakref.WeakSet()

    def __call__(self) -> None:
        loop = self._loop
        if not loop.is_running() and not loop.is_closed() and self.is_ours():
            open_layers = [one for one in self.loop_layers if one.is_open]
            if open_layers:
                self._end(open_layers)
        self._close()  # An error, if it is running.
        # There was a cycle, which only a garbage collection would end.
        if vars(loop).get("close") is self:
            del vars(loop)["close"]

    def _end(self, loop_layers: list[LoopLayer]) -> None:
        """Run the loop until they have ended; not on the thread of a loop that is running."""
        if not _is_in_a_running_loop():
            self._run(loop_layers)
            return
        thread = threading.Thread(target=self._run, args=(loop_layers,), name="channels_rabbitmq")
        with contextlib.suppress(RuntimeError):  # The process is ending.
            thread.start()
            thread.join()

    def _run(self, loop_layers: list[LoopLayer]) -> None:
        closing = _close_all(loop_layers)
        try:
            self._loop.run_until_complete(closing)
        except Exception:  # Somebody stops the loop, for instance.
            closing.close()


def _is_in_a_running_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _close_all(loop_layers: list[LoopLayer]) -> None:
    await asyncio.gather(*(one.close_at_exit(cancel_calls=True) for one in loop_layers))
    await asyncio.sleep(0)  # lets transports close their sockets
