"""``Run``: the tests of one process, with exchanges of their own, and nothing left behind.

Two runs on one RabbitMQ, such as two workers of pytest-xdist, would hear each other if both used
``groups``. So all layers of a process use other exchanges as long as it runs tests:
``crq.test.<random>.groups`` in place of ``groups``. (The permissions that the layer needs cover
such a name.) That happens in each layer's first call, by ``Process.prepare``, whichever way and
whenever the layer was made: modules of Django projects make them when they are imported. The first
of these calls also finds out whether RabbitMQ is there, once for the run.

A process that a test has forked, such as a live server, uses the exchanges of its parent. Each
process keeps them with a connection of its own: the parent may never use a layer.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import multiprocessing
import multiprocessing.util
import os
import secrets
import threading
import time
import weakref
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from .._broker.normal_queues import queue_name
from .._broker.shared import Shared
from .._loop_layer import LoopLayer
from .._loops.process import current
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ._keeper import LONGEST_LOOK, Keeper
from ._memory_broker import flush_all

logger = logging.getLogger("channels_rabbitmq.messages")

VARIABLE = "WITHOUT_RABBITMQ"
WHAT_TO_DO = (
    "Start RabbitMQ (docker run --rm -p 5672:5672 rabbitmq), or name a running one in the option "
    "host; or use channels_rabbitmq.testing.InMemoryChannelLayer; or skip the tests that need it: "
    f"pytest --without-rabbitmq=skip, or {VARIABLE}=skip in the environment"
)
_LONGEST_NAME = 100  # of the project's exchange, in the name of the run's
# Seconds after which RabbitMQ deletes queues of normal channels if the run, or a process that a
# test has started, was killed.
_NORMAL_QUEUE_EXPIRY = 60.0
_TIMEOUT = 5.0  # for each flush
_END_TIMEOUT = 3.0


class _Held:
    """What one process of a run has."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # By the broker's URLs and the exchange
        self.keepers: dict[tuple[str, str], Keeper] = {}
        self.refusals: dict[tuple[str, str], str] = {}
        self.prepared: list[tuple[Settings, Shared]] = []

    def normal_channels(self, key: tuple[str, str]) -> set[str]:
        """Return those that the layers on one exchange have used."""
        return {
            channel
            for settings, shared in self.prepared
            if (settings.host, settings.groups_exchange) == key
            for channel in list(shared.normal_channels)
        }


class Run:
    """The exchanges of one run. Any thread may use it."""

    def __init__(self, token: str = "") -> None:
        self.pid = os.getpid()
        self.token = token or secrets.token_hex(6)
        self.refused_calls = 0
        self.refusal = ""  # why there is no RabbitMQ
        self._has_ended = False
        self._former: weakref.WeakSet[LoopLayer] = weakref.WeakSet()  # made before the run
        # By process. A fork's child doesn't touch what its parent has opened.
        self._held: dict[int, _Held] = {}

    def start(self) -> None:
        """Have all layers use the run's exchanges from their next call on."""
        process = current()
        process.prepare = self.prepare
        # One whose event loop has stopped closes only if that runs again.
        self._former = weakref.WeakSet(_loop_layers())
        for registry in process.registries():
            registry.start_over()

    def exchange(self, groups_exchange: str) -> str:
        """Return the name of the run's exchange in place of the project's."""
        return f"crq.test.{self.token}.{groups_exchange[:_LONGEST_NAME]}"

    def prepare(self, settings: Settings, shared: Shared) -> Settings:
        """Return a layer's settings for this run.

        Raises BrokerUnavailable if RabbitMQ isn't there. That takes ``LONGEST_LOOK`` seconds at
        most, and no time once it is known.
        """
        moved = replace(
            settings,
            groups_exchange=self.exchange(settings.groups_exchange),
            allow_flush=True,
            normal_queue_expiry=_NORMAL_QUEUE_EXPIRY,
        )
        if not self._has_ended:
            held = self._held_here()
            with held.lock:
                self._keep(held, moved)
                held.prepared.append((moved, shared))
        return moved

    def _held_here(self) -> _Held:
        return self._held.setdefault(os.getpid(), _Held())

    def _keep(self, held: _Held, settings: Settings) -> None:
        key = (settings.host, settings.groups_exchange)
        if key in held.keepers:
            return
        if key not in held.refusals:
            try:
                held.keepers[key] = _on_background_loop(_open_keeper(settings), LONGEST_LOOK + 1)
            except BrokerUnavailable as err:
                held.refusals[key] = f"No RabbitMQ for the tests. {err}. {WHAT_TO_DO}"
            else:
                return
        self.refused_calls += 1
        self.refusal = held.refusals[key]
        raise BrokerUnavailable(self.refusal)

    def reset(self) -> None:
        """Empty all layers of this process: channels, groups, and normal channels.

        Blocks for some milliseconds. To be called between two tests, from sync code.
        """
        flush_all()
        try:
            for loop_layer in _loop_layers():
                if not loop_layer.is_closing and loop_layer not in self._former:
                    _flush(loop_layer)
            self._delete_normal_channels()
        except BrokerUnavailable as err:  # What it had is gone, most likely.
            logger.warning("not emptied after a test: %s", err)

    def _delete_normal_channels(self) -> None:
        """Also those of event loops that have ended, and so flush nothing."""
        held = self._held_here()
        for key, keeper in held.keepers.items():
            channels = held.normal_channels(key)
            if channels:
                names = {queue_name(key[1], channel): channel for channel in channels}
                left = _on_background_loop(keeper.delete(names), _TIMEOUT)
                deleted = {names[queue] for queue in names.keys() - left}
                for _, shared in held.prepared:
                    shared.normal_channels.difference_update(deleted)

    def end(self) -> None:
        """Close all layers of this process, and delete what the run has left on RabbitMQ."""
        if self._has_ended or self.pid != os.getpid():
            return
        self._has_ended = True
        current().close_all(time.monotonic() + _END_TIMEOUT)
        held = self._held_here()
        for key, keeper in held.keepers.items():
            queues = [queue_name(key[1], channel) for channel in held.normal_channels(key)]
            with contextlib.suppress(BrokerUnavailable):
                _on_background_loop(keeper.close(queues), _END_TIMEOUT)


def _loop_layers() -> list[LoopLayer]:
    return [one for registry in current().registries() for one in registry.all()]


def _flush(loop_layer: LoopLayer) -> None:
    flushing = loop_layer.flush_here(loop_layer.loop.time() + _TIMEOUT)
    _run_on(loop_layer.loop, flushing, _TIMEOUT + 1)


async def _open_keeper(settings: Settings) -> Keeper:
    keeper = Keeper(settings)
    await keeper.open()
    return keeper


def _on_background_loop(coroutine: Coroutine[Any, Any, Any], timeout: float) -> Any:
    process = current()
    with process.lock:
        loop = process.background().loop
    return _run_on(loop, coroutine, timeout)


def _run_on(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], timeout: float
) -> Any:
    """Run a coroutine on an event loop, which may have stopped.

    Raises BrokerUnavailable, too, if that takes longer than ``timeout`` seconds.
    """
    if loop.is_running():
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise BrokerUnavailable(f"The event loop was busy for {timeout:g} s") from None
    results: list[Any] = []
    # Another thread, since a loop of somebody's may be running in this one.
    thread = threading.Thread(target=lambda: results.append(_try(loop, coroutine)))
    thread.start()
    thread.join()
    [(result, error)] = results
    if error is not None:
        raise error
    return result


def _try(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]
) -> tuple[Any, Exception | None]:
    try:
        return loop.run_until_complete(coroutine), None
    except Exception as err:
        coroutine.close()
        return None, err


_run: Run | None = None


def begin() -> Run:
    """Return the run of this process; the first call starts it, and has it end with the process."""
    global _run
    if _run is None or _run.pid != os.getpid():
        _run = Run()
        _run.start()
        if multiprocessing.parent_process() is None:
            atexit.register(_run.end)
        else:  # The worker processes of Django's test runner call no atexit functions.
            multiprocessing.util.Finalize(None, _run.end, exitpriority=100)
    return _run


def find() -> Run:
    """Return the run that this process belongs to, its own or its parent's."""
    return begin() if _run is None else _run


def join(token: str) -> None:
    """Use the exchanges of another process's run in this one, which that process has started."""
    global _run
    _run = Run(token)
    _run.start()
