"""``BackgroundLoop``: the event loop that serves sync code.

A loop that ``async_to_sync`` has made lives for one call only, so its calls are forwarded to the
background loop, in one daemon thread for the process. (``async_to_sync`` in a thread of
``sync_to_async`` makes no loop. It uses the one that waits.)
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading

from asgiref.sync import AsyncToSync

from ..exceptions import BrokerUnavailable


def is_of_async_to_sync(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether ``async_to_sync`` has made this loop, for one call."""
    # The same in asgiref 3.6 to 3.13. If it is removed, such loops get connections of their own.
    return loop in getattr(AsyncToSync, "loop_thread_executors", ())


def threads_are_real() -> bool:
    """Whether threads can have an event loop each: not where gevent or eventlet replaced them.

    There each call of ``async_to_sync`` has a connection of its own, as long as it lasts.
    """
    gevent = sys.modules.get("gevent.monkey")
    eventlet = sys.modules.get("eventlet.patcher")
    return not (
        (gevent is not None and gevent.is_module_patched("threading"))
        or (eventlet is not None and eventlet.is_monkey_patched("thread"))
    )


class BackgroundLoop:
    """An event loop in a daemon thread.

    Raises BrokerUnavailable if no thread can be started, since the process is ending.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="channels_rabbitmq", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as err:
            self.loop.close()
            raise BrokerUnavailable(f"The process is ending: {err}") from None

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            # As asyncio.run() ends.
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def close(self, timeout: float) -> None:
        """End it, within ``timeout`` seconds or not."""
        with contextlib.suppress(RuntimeError):  # closed
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout)
