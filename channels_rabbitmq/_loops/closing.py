"""The layer's connections on an event loop end with it, also if a program only closes the loop.

``asyncio.run`` cancels all tasks before it closes its loop, and so the layer's connections end. But
programs that make their own loops often just close them: pytest-asyncio below 1.1, scripts, Celery
tasks. asyncio then forgets what is scheduled, and no task hears of it. Sockets would stay open, and
on the broker connections and queues, until the garbage collector destroys the tasks. asyncio
complains of each ("Task was destroyed but it is pending", "unclosed transport"), and the
``finally`` of each task fails on a closed loop. Fifty calls, each on a loop of its own, made 2,700
lines.

asyncio has no event for the close of a loop. So the ``close`` of a loop that uses the layer is
wrapped, on that one object: before it is closed, the loop runs for a moment more, in which the
layer closes as at the end of the process. That takes as long as the broker needs to answer the
closing handshake, 2 ms, or a second if it doesn't answer. If nothing of the layer is open,
``close`` only closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable

from .._loop_layer import LoopLayer


def close_before_loop(loop_layer: LoopLayer, is_ours: Callable[[], bool]) -> None:
    """Have the ``close`` of its event loop close a ``LoopLayer``, if ``is_ours()`` then.

    ``is_ours`` is false in the child of a fork, where the sockets are the parent's.
    """
    loop = loop_layer.loop
    try:
        attributes = vars(loop)
    except TypeError:  # The loop takes no attributes. The next use of the layer finds it closed.
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
        self._close()  # Raises if the loop is running.
        # Else the loop and this would refer to each other until a garbage collection.
        if vars(loop).get("close") is self:
            del vars(loop)["close"]

    def _end(self, loop_layers: list[LoopLayer]) -> None:
        """Run the loop until they are closed, on another thread if this one has a running loop."""
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
        except Exception:  # A callback of the program stops the loop, for instance.
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
