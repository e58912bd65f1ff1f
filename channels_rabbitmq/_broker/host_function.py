"""``host`` as a function of the project, which gives the URLs before each round of attempts.

It is for credentials that change while the process runs, as Vault's do, and for brokers that move.
The layer doesn't rely on the function to be quick or right. An async function runs on the layer's
event loop, a sync one in a daemon thread of ours; while that hangs, the function isn't called
again. It may take ``connect_timeout``. If it raises, gives no URL, or gives none in time, that is a
failed attempt like any other.

Its exception is logged without anything that could be the password of a URL, and without a
traceback, because the lines of a traceback can't be searched for passwords.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from .._amqp.url import BrokerUrl
from .._functions import import_function, is_async
from .._futures import ends_in_time
from .._settings.hosts import read_hosts
from .._settings.readers import HostFunction, check_host_function
from .._settings.settings import Settings, check_ssl_context
from .._threads import call_once

# Seconds that an async function may take to end when it was cancelled.
_CANCEL_TIMEOUT = 1.0
# A password may hold anything, so: up to the last @ of the line.
_CREDENTIALS = re.compile(r"://.*@")


class NoUrl(OSError):
    """The project's function gives no URL now. The text says why, without secrets."""


class _Raised(Exception):
    """Carries the function's exception, of any class: SystemExit would end the event loop."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def with_imported_host(settings: Settings) -> Settings:
    """Return the settings with the function in place of its dotted path.

    Raises InvalidChannelLayerError if it can't be imported.
    """
    path = settings.host_function
    if not isinstance(path, str):
        return settings
    return replace(settings, host_function=import_function("host", path, check_host_function))


async def current_urls(settings: Settings) -> tuple[BrokerUrl, ...]:
    """Return the URLs to connect to, now. Raises NoUrl."""
    function = settings.host_function
    if function is None:
        return settings.urls
    assert not isinstance(function, str), "it was imported"
    value = await _ask(function, settings.connect_timeout)
    try:
        urls = read_hosts("its result", value)
        check_ssl_context(settings.ssl_context, urls)
    except ValueError as err:
        raise NoUrl(str(err)) from None
    return urls


async def _ask(function: HostFunction, timeout: float) -> Any:
    """Return what the function returns, awaited if it is awaitable."""
    task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(
        _call(function), name="channels_rabbitmq host"
    )
    if not await ends_in_time(task, timeout, cancel_timeout=_CANCEL_TIMEOUT):
        raise NoUrl(f"it gave none within {timeout:g} s")
    if task.cancelled():
        raise NoUrl("it was cancelled")
    error = task.exception()
    if error is not None:
        raise NoUrl(_describe(error.error if isinstance(error, _Raised) else error)) from None
    return task.result()


async def _call(function: HostFunction) -> Any:
    if is_async(function):
        result = function()
    else:
        result = await call_once("host", id(function), lambda: _call_sync(function))
    if not inspect.isawaitable(result):
        return result
    try:
        return await result
    except (Exception, SystemExit) as err:
        raise _Raised(err) from None


def _call_sync(function: HostFunction) -> Any:
    try:
        return function()
    except BaseException as err:
        raise _Raised(err) from None


def _describe(error: BaseException) -> str:
    text = _CREDENTIALS.sub("://...@", str(error))
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"it raised {type(error).__name__}{text and f': {text}'}{place}"
