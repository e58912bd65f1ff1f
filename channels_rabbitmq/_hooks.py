"""``on_disconnect`` and ``on_reconnect``: a project's functions, told when messages may be missed.

**When.** What matters to an application is the connection that receives: while it is down, what is
sent to this event loop's groups is lost. So a ``Hook`` is called when that one was lost, and when
it is back *and* each group that had members is bound again (or refused, which the log tells). What
is fetched then, from a database perhaps, misses nothing, since later changes come as messages. The
two take turns: a connection that is lost again before all groups are bound calls neither.

**How.** A project's function is not trusted to be quick or right. Each call runs in a task of its
own, in an empty context; sync functions in a thread, where ``async_to_sync`` uses this event loop.
While a call runs its hook isn't called again; what is due by then is, once, with the last reason.
So a hook that hangs leaves one task behind, or one thread, and not one for each reconnect. The
threads are daemons: unlike those of an executor they don't hold up the end of the process.

**Import.** A dotted path is imported when the first event loop begins to use the layer, and not
when the layer is made: that may be while Django still loads the very module.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from dataclasses import dataclass

from asgiref.sync import SyncToAsync

from ._functions import import_function, is_async
from ._futures import start_task
from ._settings.readers import NO_MESSAGE_TYPE, HookFunction, check_hook
from ._settings.settings import Settings
from ._threads import DaemonThreads

logger = logging.getLogger("channels_rabbitmq.hooks")

# Seconds that a hook may take to end when it was cancelled.
_CANCEL_TIMEOUT = 1.0


@dataclass(frozen=True)
class HookFunctions:
    """What to call, imported; None: nothing."""

    on_disconnect: HookFunction | None
    on_reconnect: HookFunction | None

    @classmethod
    def load(cls, settings: Settings) -> HookFunctions:
        """Import what the settings name. Raises InvalidChannelLayerError."""
        return cls(
            on_disconnect=_load("on_disconnect", settings.on_disconnect),
            on_reconnect=_load("on_reconnect", settings.on_reconnect),
        )


def _load(option: str, value: HookFunction | str | None) -> HookFunction | None:
    if not isinstance(value, str):
        return value
    return import_function(option, value, check_hook, note=f"; {NO_MESSAGE_TYPE}")


class Hook:
    """One hook of one ``LoopLayer``, whose id is ``id_``; serves the running event loop."""

    def __init__(self, option: str, function: HookFunction | None, id_: str) -> None:
        self._option = option
        self._function = function
        self._id = id_
        self._due: str | None = None  # a call, with this reason
        self._task: asyncio.Task[None] | None = None  # the call that is running
        self._is_closed = False

    def call(self, reason: str) -> None:
        """Have it called, soon. Raises nothing."""
        if self._function is None or self._is_closed:
            return
        self._due = reason
        if self._task is None:
            self._task = start_task(self._run(), name=f"channels_rabbitmq {self._option}")

    async def _run(self) -> None:
        try:
            while self._due is not None:
                reason, self._due = self._due, None
                try:
                    await self._call(reason)
                except Exception:
                    logger.exception("%s: it raised an exception", self._option)
        finally:
            self._task = None

    async def _call(self, reason: str) -> None:
        function = self._function
        assert function is not None
        if not is_async(function):
            in_thread = SyncToAsync(
                function,
                thread_sensitive=False,
                executor=DaemonThreads("hook"),  # type: ignore[arg-type]  # any Executor will do
            )
            result = await in_thread(self._id, reason)
        else:
            result = function(self._id, reason)
        if inspect.isawaitable(result):  # also of a lambda
            await result

    def close(self) -> None:
        """Call nothing more, and cancel what runs."""
        self._is_closed = True
        self._due = None
        if self._task is not None:
            self._task.cancel()

    async def wait_closed(self) -> None:
        """Wait for what ``close`` has cancelled, about a second at most."""
        task = self._task
        if task is not None and task is not asyncio.current_task():
            await asyncio.wait([task], timeout=_CANCEL_TIMEOUT)


class Hooks:
    """Both hooks of one ``LoopLayer``."""

    def __init__(self, functions: HookFunctions, id_: str) -> None:
        self.on_disconnect = Hook("on_disconnect", functions.on_disconnect, id_)
        self.on_reconnect = Hook("on_reconnect", functions.on_reconnect, id_)

    def close(self) -> None:
        """Call nothing more, and cancel what runs."""
        self.on_disconnect.close()
        self.on_reconnect.close()

    async def wait_closed(self) -> None:
        """Wait for what ``close`` has cancelled."""
        await self.on_disconnect.wait_closed()
        await self.on_reconnect.wait_closed()
