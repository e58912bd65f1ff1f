"""From a URL to an open connection, for ``check``: each stage is a step of its own.

All addresses of a host are tried, each by itself and all at once. The layer uses the first that
works; the check also tells of the others.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .._amqp.connection import Connection
from .._amqp.resolving import Address, resolve
from .._amqp.stages import Stage
from .._amqp.url import BrokerUrl
from .._broker.connector import connection_name
from .._broker.reasons import describe
from .._settings.settings import Settings
from .check_hints import advise_on_stage
from .check_report import Finding, Status, Step
from .check_tls import describe_tls
from .check_versions import describe_broker

# Seconds, at most: a name server; all from TCP to the virtual host; addresses other than the first
# that works.
_LOOK_UP = 3.0
_CONNECT = 4.0
_GRACE = 1.0

LOOK_UP = "name look-up"
TLS = "TLS"
STEP_OF = {
    Stage.TCP: "TCP",
    Stage.SECURED: TLS,
    Stage.GREETED: "RabbitMQ",
    Stage.LOGGED_IN: "login",
    Stage.OPEN: "virtual host",
}
STEPS = (LOOK_UP, *STEP_OF.values())


@dataclass(eq=False)
class _Attempt:
    """An attempt at one address, and when it came to which stage (loop time)."""

    url: BrokerUrl
    connection: Connection
    times: dict[Stage, float] = field(default_factory=dict)
    begun_at: float = 0.0
    ended_at: float = 0.0
    error: Exception | None = None

    async def run(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        self.begun_at = loop.time()
        self.connection.on_stage = self._on_stage
        try:
            await self.connection.connect(deadline)
        except Exception as err:
            self.error = err
        self.ended_at = loop.time()

    def _on_stage(self, stage: Stage) -> None:
        self.times[stage] = asyncio.get_running_loop().time()

    @property
    def stage(self) -> int:
        """The last stage that it has reached; 0 if none."""
        return max(self.times, default=0)

    @property
    def failed_at(self) -> Stage:
        """The stage that it has not reached."""
        is_of_file = getattr(self.error, "filename", None) or "files for TLS" in str(self.error)
        if is_of_file or isinstance(self.error, ssl.SSLError):
            return Stage.SECURED
        following = Stage(self.stage + 1)
        return Stage.GREETED if following is Stage.SECURED and not self.url.tls else following


@dataclass
class UrlTrial:
    """What became of one URL."""

    url: BrokerUrl
    steps: list[Step]
    connection: Connection | None  # open, if all went well


async def try_url(url: BrokerUrl, settings: Settings, id_: str, deadline: float) -> UrlTrial:
    """Connect by ``deadline`` (loop time), and within the project's own limit."""
    loop = asyncio.get_running_loop()
    begun_at = loop.time()
    try:
        addresses = await resolve(url.host, url.port, min(deadline, begun_at + _LOOK_UP))
    except OSError as err:
        finding = Finding(
            describe(err), advise_on_stage(0, err, url, settings.groups_exchange), Status.FAILED
        )
        return UrlTrial(url, [Step(LOOK_UP, finding, loop.time() - begun_at)], None)
    shown = ", ".join(dict.fromkeys(address.socket_address[0] for address in addresses))
    steps = [Step(LOOK_UP, Finding(shown), loop.time() - begun_at)]
    timeout = url.connection_timeout or settings.connect_timeout
    limit = min(deadline, loop.time() + min(timeout, _CONNECT))
    attempts = [_make_attempt(url, settings.ssl_context, address, id_) for address in addresses]
    await _run_all(attempts, limit)
    best = max(attempts, key=lambda attempt: (attempt.stage, -attempt.ended_at))
    others = [attempt for attempt in attempts if attempt is not best]
    steps += _steps_of(best, others, settings.groups_exchange)
    is_open = best.stage == Stage.OPEN and best.error is None
    for attempt in others:
        attempt.connection.abort()
    return UrlTrial(url, steps, best.connection if is_open else None)


def _make_attempt(
    url: BrokerUrl, ssl_context: ssl.SSLContext | None, address: Address, id_: str
) -> _Attempt:
    text, *_ = address.socket_address
    zone = address.socket_address[3:]  # of IPv6
    host = f"{text}%{zone[0]}" if zone and zone[0] else text
    at = replace(url, host=host)
    if url.tls:
        at = replace(at, server_name_indication=url.server_name_indication or url.host)
    name = connection_name("check", id_)
    return _Attempt(at, Connection(at, ssl_context=ssl_context, connection_name=name))


async def _run_all(attempts: Sequence[_Attempt], deadline: float) -> None:
    """Run them until all have ended, or a moment after the first that works."""
    loop = asyncio.get_running_loop()
    tasks = {loop.create_task(attempt.run(deadline)) for attempt in attempts}
    pending = set(tasks)
    try:
        while pending and not any(each.stage == Stage.OPEN for each in attempts):
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if pending:
            await asyncio.wait(pending, timeout=_GRACE)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _steps_of(best: _Attempt, others: Sequence[_Attempt], groups_exchange: str) -> list[Step]:
    """Return the steps of the attempt that has come furthest."""
    steps = []
    since = best.begun_at
    for stage, name in STEP_OF.items():
        if stage is Stage.SECURED and not best.url.tls:
            continue
        if best.error is not None and stage is best.failed_at:
            advice = advise_on_stage(best.stage, best.error, best.url, groups_exchange)
            finding = Finding(describe(best.error), advice, Status.FAILED)
            steps.append(Step(name, finding, best.ended_at - since))
            break
        at = best.times.get(stage)
        if at is None:  # Files for TLS are read before anything is sent.
            continue
        steps.append(Step(name, _describe_stage(stage, best, others), at - since))
        since = at
    return steps


def _describe_stage(stage: Stage, attempt: _Attempt, others: Sequence[_Attempt]) -> Finding:
    url, connection = attempt.url, attempt.connection
    if stage is Stage.TCP:
        return _describe_tcp(url, others)
    if stage is Stage.SECURED:
        return describe_tls(connection.tls)
    if stage is Stage.GREETED:
        return describe_broker(connection.server_properties)
    return Finding(repr(url.username if stage is Stage.LOGGED_IN else url.virtual_host))


def _describe_tcp(url: BrokerUrl, others: Sequence[_Attempt]) -> Finding:
    text = _show_address(url)
    failed = [each for each in others if each.stage < Stage.OPEN]
    if not failed:
        return Finding(", ".join([text, *(_show_address(each.url) for each in others)]))
    told = [f"not {_show_address(e.url)}: {_describe_failure(e)}" for e in failed]
    return Finding("; ".join([text, *told]), status=_status_of(failed))


def _status_of(failed: Sequence[_Attempt]) -> Status:
    """A refusal costs the layer nothing: ``localhost`` often has an address without a listener."""
    is_refused = all(isinstance(each.error, ConnectionRefusedError) for each in failed)
    return Status.OK if is_refused else Status.WARNING


def _describe_failure(attempt: _Attempt) -> str:
    return "no answer" if attempt.error is None else describe(attempt.error)


def _show_address(url: BrokerUrl) -> str:
    return f"[{url.host}]:{url.port}" if ":" in url.host else f"{url.host}:{url.port}"
