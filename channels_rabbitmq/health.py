"""Whether this process is well: functions, and Django views for probes.

*Live*: each event loop of this process that uses the layer runs what is due. If not, only a restart
helps. *Ready*: they are also connected, and RabbitMQ takes messages, as far as they notice. If
not, a restart is of no use: the layer reconnects by itself.

RabbitMQ (tried with 3.10) tells a connection of an alarm when it connects or publishes, not before.
So a process that publishes nothing stays ready in an alarm.

::

    urlpatterns = [
        path("health/live", channels_rabbitmq.health.live),
        path("health/ready", channels_rabbitmq.health.ready),
    ]

Nothing is published, and an answer takes about a millisecond. What is told has no URL, no host, no
text of the broker's: who may ask is the project's business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from django.http import HttpResponseNotAllowed, JsonResponse

from ._configured import configured_layer
from ._futures import run_until
from .exceptions import BrokerUnavailable
from .statistics import LoopLayerStatistics

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponseBase

# An event loop that is late by so many seconds isn't live.
BLOCKED = 10.0
# Seconds that ``ready`` waits for a connection. Kubernetes waits one second for an answer.
CONNECT_TIMEOUT = 0.5


@dataclass(frozen=True)
class Health:
    """What a probe wants to know."""

    is_well: bool

    problems: tuple[str, ...]
    """One line each, with the id of the event loop's channels."""


def check_live(alias: str = "default") -> Health:
    """Tell whether the event loops of this process run. From any thread.

    An event loop that isn't used any more, because it has stopped, doesn't count. Raises
    InvalidChannelLayerError if ``CHANNEL_LAYERS`` has no layer of this package as ``alias``.
    """
    return _health(_blocked(configured_layer(alias).statistics()))


async def check_ready(alias: str = "default") -> Health:
    """Tell whether this process can send and receive, as far as it has noticed.

    It notices an alarm of RabbitMQ's when it connects or publishes.

    If nothing has connected yet, this does, as ``connect()``, and waits for half a second at most.
    Other event loops of the process count if they have needed a connection. From any event loop,
    also by ``async_to_sync``. Raises as ``check_live``.
    """
    layer = configured_layer(alias)
    deadline = asyncio.get_running_loop().time() + CONNECT_TIMEOUT
    unavailable = False
    try:
        await run_until(deadline, layer.connect())
    except (BrokerUnavailable, TimeoutError, asyncio.TimeoutError):
        unavailable = True
    statistics = layer.statistics()
    problems = [*_blocked(statistics), *_unconnected(statistics)]
    if unavailable and not problems:
        problems = ["there was no connection a moment ago"]
    return _health(problems)


def _health(problems: Iterable[str]) -> Health:
    found = tuple(problems)
    return Health(not found, found)


def _blocked(statistics: Iterable[LoopLayerStatistics]) -> list[str]:
    return [
        f"{one.id}: the event loop has been blocked for {one.loop_late:.0f} s"
        for one in statistics
        if one.loop_late >= BLOCKED
    ]


def _unconnected(statistics: Iterable[LoopLayerStatistics]) -> list[str]:
    problems = []
    for one in statistics:
        for role, connection in (("publisher", one.publisher), ("subscriber", one.subscriber)):
            if connection.state in ("connecting", "waiting"):
                seconds = max(0.0, time.time() - connection.since)
                problems.append(f"{one.id}: {role}: no connection for {seconds:.0f} s")
        if one.is_blocked:
            problems.append(f"{one.id}: RabbitMQ takes no messages")
    return problems


async def live(request: HttpRequest, alias: str = "default") -> HttpResponseBase:
    """Answer 200 if ``check_live`` finds no problem, else 503; under ASGI and WSGI."""
    return _response(request, check_live(alias))


async def ready(request: HttpRequest, alias: str = "default") -> HttpResponseBase:
    """Answer 200 if ``check_ready`` finds no problem, else 503; under ASGI and WSGI."""
    return _response(request, await check_ready(alias))


def _response(request: HttpRequest, health: Health) -> HttpResponseBase:
    if request.method not in ("GET", "HEAD"):
        return HttpResponseNotAllowed(["GET", "HEAD"])
    return JsonResponse(
        {"ok": health.is_well, "problems": list(health.problems)},
        status=200 if health.is_well else 503,
        headers={"Cache-Control": "no-store"},
    )
