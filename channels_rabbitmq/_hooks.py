"""Call the project's functions ``on_disconnect`` and ``on_reconnect`` if messages may be missed.

**When.** While the connection that receives is down, messages to this event loop's groups are lost.
So ``on_disconnect`` is called when that connection is lost. ``on_reconnect`` is called when it is
back *and* each group that had members is bound again, or its bind was refused and logged. A client
that then fetches its data, perhaps from a database, misses nothing, since later changes come as
messages. The two hooks take turns: a connection that is lost again before all groups are bound
calls neither.

**How.** A project's function may be slow or fail. Each call runs in a task of its own, in an empty
context. Sync functions run in a thread, where ``async_to_sync`` uses this event loop. At most one
call of a hook runs at a time. If the hook becomes due meanwhile, it is called once more, with the
latest reason. So a hook that hangs leaves one task or one thread behind, and not one for each
reconnect. The threads are daemons: unlike an executor's they don't hold up the end of the process.

**Import.** A dotted path is imported when the first event loop begins to use the layer. It isn't
imported when the layer is made, because Django may still be loading that very module.
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

# Seconds that a cancelled hook may take to end.
_CANCEL_TIMEOUT = 1.0


@dataclass(frozen=True)
class HookFunctions:
    """The imported functions; None: there is none."""

    on_disconnect: HookFunction | None
    on_reconnect: HookFunction | None

    @classmethod
    def load(cls, settings: Settings) -> HookFunctions:
        """Import the functions that the settings name. Raises InvalidChannelLayerError."""
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
        self._due: str | None = None  # the reason of the call that is due
        self._task: asyncio.Task[None] | None = None  # the call that is running
        self._is_closed = False

    def call(self, reason: str) -> None:
        """Have the function called soon. Raises nothing."""
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
                    logger.exception("%s %s: it raised an exception", self._option, self._id)
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
        if inspect.isawaitable(result):  # A lambda, too, may return an awaitable.
            await result

    def close(self) -> None:
        """Cancel the running call and make no more."""
        self._is_closed = True
        self._due = None
        if self._task is not None:
            self._task.cancel()

    async def wait_closed(self, timeout: float = _CANCEL_TIMEOUT) -> None:
        """Wait for the call that ``close`` has cancelled, ``timeout`` seconds at most."""
        task = self._task
        if task is not None and task is not asyncio.current_task():
            await asyncio.wait([task], timeout=timeout)


class Hooks:
    """Both hooks of one ``LoopLayer``."""

    def __init__(self, functions: HookFunctions, id_: str) -> None:
        self.on_disconnect = Hook("on_disconnect", functions.on_disconnect, id_)
        self.on_reconnect = Hook("on_reconnect", functions.on_reconnect, id_)

    def close(self) -> None:
        """Cancel the running calls and make no more."""
        self.on_disconnect.close()
        self.on_reconnect.close()

    async def wait_closed(self) -> None:
        """Wait for the calls that ``close`` has cancelled."""
        await self.on_disconnect.wait_closed()
        await self.on_reconnect.wait_closed()
