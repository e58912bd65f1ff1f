"""``check``: tries the settings and the broker step by step, and says what is wrong.

It uses the layer's own parts: first one connection of its own, on which each stage is a step, and
then a whole layer. It declares what a process with the layer declares, and leaves nothing behind
but the groups exchange.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from channels.exceptions import InvalidChannelLayerError

from .._amqp.connection import Connection
from .._amqp.url import BrokerUrl
from .._broker.host_function import NoUrl, current_urls, with_imported_host
from .._identity import new_id
from .._settings.settings import Settings
from . import target
from .check_broker import BrokerSteps
from .check_connection import STEPS as CONNECTION_STEPS
from .check_connection import TLS, UrlTrial, try_url
from .check_hints import advise_on
from .check_layer import LayerSteps
from .check_report import Finding, Report, Status, Step
from .check_trial import Broken, Stopped, Trial, collected_warnings
from .errors import Failed
from .quiet import quiet_log

# Seconds in all, but for closing the connections (one more), and for one step
_LONGEST = 7.5
_LIMIT = 3.0

SETTINGS = "settings"

StepCoroutine = Coroutine[Any, Any, Finding]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    target.add_arguments(parser, "check this broker")
    parser.add_argument(
        "--send-only",
        action="store_true",
        help="for a process that only sends, such as a Celery worker: it needs fewer permissions",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Check. Raises Failed if something is wrong, and Misuse for wrong arguments."""
    begun_at = time.monotonic()
    report = Report(as_json=arguments.json)
    try:
        name, settings = target.read_target(arguments)
    except InvalidChannelLayerError as err:
        report.add(Step(SETTINGS, Finding(str(err), status=Status.FAILED)))
    else:
        check = Check(name, settings, report, only_sends=arguments.send_only)
        with quiet_log():  # asyncio.run() logs, too.
            asyncio.run(check.run())
    report.finish(time.monotonic() - begun_at)
    failed = report.with_status(Status.FAILED)
    if failed:
        raise Failed(f"the channel layer doesn't work: {', '.join(failed)}")
    return 0


class Check:
    """One check of the layer or URL that is called ``name``."""

    def __init__(self, name: str, settings: Settings, report: Report, *, only_sends: bool) -> None:
        self._name = name
        self._settings = settings
        self._report = report
        self._only_sends = only_sends
        self._id = new_id()
        self._url: BrokerUrl | None = None  # the one that works
        self._open: list[Connection] = []
        self.urls: tuple[BrokerUrl, ...] = ()  # all, once they are known

    async def run(self) -> None:
        """Try all steps, until one fails."""
        deadline = asyncio.get_running_loop().time() + _LONGEST
        trial = Trial(self._report, deadline, self._advise)
        with collected_warnings(trial):
            try:
                await trial.step(SETTINGS, self._read(), limit=_LIMIT)
                self._report.names = self.names()
                await self._try_broker(trial, await self._connect(deadline))
                await self._close_all()
                await self._try_layer(trial)
            except Stopped:
                return
            finally:
                await self._close_all()

    async def _close_all(self) -> None:
        await asyncio.gather(*(connection.close() for connection in self._open))

    def _advise(self, exc: Exception) -> str:
        return "" if self._url is None else advise_on(exc, self._url)

    def names(self) -> list[str]:
        """Return the names of all steps."""
        has_tls = any(url.tls for url in self.urls)
        names = [SETTINGS, *(name for name in CONNECTION_STEPS if has_tls or name != TLS)]
        names += ["exchange", "permissions"]
        return names + [name for name, _ in self._layer_steps()]

    async def _read(self) -> Finding:
        """Do what the settings leave for later: import, and ask for the URLs."""
        limit = min(_LIMIT, self._settings.connect_timeout)
        try:
            self._settings = with_imported_host(self._settings)
            _ = self._settings.codec
            self.urls = await current_urls(replace(self._settings, connect_timeout=limit))
        except InvalidChannelLayerError as err:
            raise Broken(str(err)) from None
        except NoUrl as err:
            raise Broken(f"{self._settings.host}: {err}") from None
        urls = ", ".join(map(str, self.urls))
        return Finding(f"{self._name}: {urls}, exchange {self._settings.groups_exchange!r}")

    async def _connect(self, deadline: float) -> Connection:
        """Try each URL, all at once; return an open connection."""
        trials = await asyncio.gather(*(self._try_url(url, deadline) for url in self.urls))
        for trial in trials:
            self._add_steps(trial, can_fail=not self._open)
        if not self._open:
            raise Stopped
        # The rest has no time to wait for those that don't answer. They are told of.
        working = tuple(trial.url for trial in trials if trial.connection is not None)
        self._settings = replace(self._settings, urls=working, host_function=None)
        connection = self._open[0]
        self._url = connection.url
        return connection

    async def _try_url(self, url: BrokerUrl, deadline: float) -> UrlTrial:
        trial = await try_url(url, self._settings, self._id, deadline)
        if trial.connection is not None:
            self._open.append(trial.connection)
        return trial

    def _add_steps(self, trial: UrlTrial, *, can_fail: bool) -> None:
        for step in trial.steps:
            finding = step.finding
            if finding.status is Status.FAILED and not can_fail:
                finding = replace(finding, status=Status.WARNING)
            url = str(trial.url) if len(self.urls) > 1 else ""
            self._report.add(replace(step, finding=finding, url=url))

    async def _try_broker(self, trial: Trial, connection: Connection) -> None:
        assert self._url is not None, "it is connected"
        steps = BrokerSteps(
            connection, self._url, self._settings, self._id, only_sends=self._only_sends
        )
        await trial.step("exchange", steps.exchange(), limit=_LIMIT)
        await trial.step("permissions", steps.permissions(), limit=_LIMIT)

    def _layer_steps(self) -> list[tuple[str, Callable[[LayerSteps], StepCoroutine]]]:
        if self._only_sends:
            return [("alarms", LayerSteps.alarms)]
        steps = [
            ("queue", LayerSteps.queue),
            ("alarms", LayerSteps.alarms),
            ("send", LayerSteps.send),
            ("group_send", LayerSteps.group_send),
        ]
        if self._settings.normal_channels:
            steps.append(("normal channel", LayerSteps.normal_channel))
        return [*steps, ("processes", LayerSteps.processes)]

    async def _try_layer(self, trial: Trial) -> None:
        layer = LayerSteps(self._settings)
        try:
            for name, step in self._layer_steps():
                await trial.step(name, step(layer), limit=_LIMIT)
        finally:
            await layer.close()
