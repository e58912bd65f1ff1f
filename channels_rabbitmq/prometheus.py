"""Metrics for Prometheus: a view and a collector. Needs ``channels_rabbitmq[prometheus]``.

A server has several processes, and a scrape reaches any one of them. That one asks the others
(``RabbitmqChannelLayer.status``) and answers for all of its host, or of the exchange. So each
process has series of its own, labelled with the id of its channels, its pid and its host. Their
counters only grow, whichever process was asked, and they end with the process. A process that
doesn't answer in time has no values in that scrape.

(The client's own mode for several processes keeps values in files and doesn't take collectors.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Literal

from asgiref.sync import async_to_sync
from django.http import HttpResponse, HttpResponseNotAllowed
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ._configured import configured_layer
from .core import RabbitmqChannelLayer
from .exceptions import BrokerUnavailable
from .statistics import ConnectionStatistics, Counters, LoopLayerStatistics
from .status import MissingProcess, ProcessStatus, Status

if TYPE_CHECKING:
    from django.http import HttpRequest

Scope = Literal["host", "exchange"]

PREFIX = "channels_rabbitmq"
TIMEOUT = 1.0
LABELS = ("process", "pid", "host")

# Of a LoopLayerStatistics, by the field's name
GAUGES = {
    "is_blocked": ("is_blocked", "Whether RabbitMQ takes no messages (an alarm)"),
    "unconfirmed": ("unconfirmed", "Messages written that RabbitMQ hasn't answered yet"),
    "highest_age": ("highest_age_seconds", "Highest age of a message received lately"),
    "loop_lag": ("loop_lag_seconds", "Longest time that the event loop was blocked lately"),
    "buffered": ("buffered", "Messages in memory that no receive() has taken yet"),
    "in_hand_over": ("in_hand_over", "Messages on their way to another event loop"),
    "channels": ("channels", "Channels with a message or a waiting receive()"),
    "receivers": ("receivers", "Calls of receive() that wait"),
    "stalled_channels": ("stalled_channels", "Channels that are behind while others wait"),
    "unacked": ("unacked", "Deliveries not yet acked"),
    "local_capacity": ("local_capacity", "The most that unacked can be"),
    "early_acked_bytes": ("early_acked_bytes", "Bytes of messages in memory that were acked"),
    "since": ("start_time_seconds", "When the event loop began to use the layer, since 1970"),
}


class RabbitmqCollector(Collector):
    """Collects the metrics of a layer, for a registry: ``REGISTRY.register(RabbitmqCollector())``.

    ``alias``: the layer's key in ``CHANNEL_LAYERS``. ``scope``: "host" (all processes with this
    one's host name) or "exchange" (all that use the layer's exchange). ``timeout``: seconds for
    their answers. A registry takes one such collector: have a registry for each alias.

    ``collect()`` blocks until they have come, so it must be called in a thread without a running
    event loop: by a sync view, or the client's ``start_http_server()``. On an event loop, such as
    that of ``make_asgi_app()``, it tells of its own process only: use the view ``metrics`` there.
    """

    def __init__(
        self, alias: str = "default", *, scope: Scope = "host", timeout: float = TIMEOUT
    ) -> None:
        self._alias = alias
        self._scope: Scope = require_scope(scope)
        self._timeout = timeout

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without values, so ``register()`` asks nobody.

        It refuses a second collector with ValueError: the output of both wouldn't be valid.
        """
        return families(Status((), (), (), is_complete=True))

    def collect(self) -> Iterator[Metric]:
        """Ask all processes, and return what they have answered. Raises as ``check_live``."""
        layer = configured_layer(self._alias)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            status = async_to_sync(_ask)(layer, self._timeout)
        else:
            status = _own_status(layer)
        yield from families(_within(status, layer, self._scope))


async def metrics(
    request: HttpRequest,
    alias: str = "default",
    scope: Scope = "host",
    timeout: float = TIMEOUT,
) -> HttpResponse:
    """Answer a scrape, under ASGI and WSGI: a view. The parameters are those of the collector."""
    if request.method not in ("GET", "HEAD"):
        return HttpResponseNotAllowed(["GET", "HEAD"])
    layer = configured_layer(alias)
    status = await _ask(layer, timeout)
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    registry = CollectorRegistry()
    registry.register(_Snapshot(_within(status, layer, require_scope(scope))))
    return HttpResponse(encode(registry), content_type=content_type)


def require_scope(scope: str) -> Scope:
    """Return it; raises ValueError if there is no such scope."""
    if scope == "host":
        return "host"
    if scope == "exchange":
        return "exchange"
    raise ValueError(f'scope must be "host" or "exchange", not {scope!r}')


class _Snapshot(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        return families(self._status)


async def _ask(layer: RabbitmqChannelLayer, timeout: float) -> Status:
    try:
        return await layer.status(timeout)
    except BrokerUnavailable:
        return _own_status(layer)


def _own_status(layer: RabbitmqChannelLayer) -> Status:
    own = tuple(ProcessStatus(one, 0.0, None) for one in layer.statistics())
    return Status(own, (), (), is_complete=False)


def _within(status: Status, layer: RabbitmqChannelLayer, scope: Scope) -> Status:
    hosts = {one.host for one in layer.statistics()}

    def is_within(one: LoopLayerStatistics | MissingProcess) -> bool:
        return scope == "exchange" or not one.host or one.host in hosts

    return Status(
        tuple(one for one in status.processes if is_within(one.statistics)),
        tuple(filter(is_within, status.silent)),
        tuple(filter(is_within, status.absent)),
        status.is_complete,
        is_blocked=status.is_blocked,
        lost=tuple(filter(is_within, status.lost)),
    )


def families(status: Status) -> Iterator[Metric]:
    """Return the metrics of a status."""
    yield from _of_all(status)
    yield from _totals(status)
    yield from _gauges(status)
    yield from _connections(status)


def _of_all(status: Status) -> Iterator[Metric]:
    for name, text, value in (
        ("processes", "Processes that have answered", len(status.processes)),
        ("silent_processes", "Processes that are connected and don't answer", len(status.silent)),
        ("absent_processes", "Processes that have just lost RabbitMQ", len(status.absent)),
        ("lost_processes", "Gone without a goodbye in the last ten minutes", len(status.lost)),
        ("is_complete", "Whether all known processes have answered", status.is_complete),
    ):
        yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=float(value))


def _totals(status: Status) -> Iterator[Metric]:
    for field in fields(Counters):
        text = f"counters.{field.name} of statistics()"
        family = CounterMetricFamily(f"{PREFIX}_{field.name}", text, labels=LABELS)
        for one in status.processes:
            family.add_metric(_labels(one), getattr(one.statistics.counters, field.name))
        yield family


def _gauges(status: Status) -> Iterator[Metric]:
    for field, (name, text) in GAUGES.items():
        family = GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=LABELS)
        for one in status.processes:
            family.add_metric(_labels(one), float(getattr(one.statistics, field)))
        yield family
    oldest = GaugeMetricFamily(
        f"{PREFIX}_oldest_seconds", "Wait of the oldest message in memory", labels=LABELS
    )
    groups = GaugeMetricFamily(
        f"{PREFIX}_groups", "Groups with members, and groups bound", labels=(*LABELS, "state")
    )
    for one in status.processes:
        oldest.add_metric(_labels(one), one.oldest)
        for state in ("required", "bound"):
            groups.add_metric((*_labels(one), state), getattr(one.statistics.groups, state))
    yield oldest
    yield groups


def _connections(status: Status) -> Iterator[Metric]:
    labels = (*LABELS, "connection")
    connected = GaugeMetricFamily(
        f"{PREFIX}_connected", "Whether a connection that is needed is open", labels=labels
    )
    reconnects = CounterMetricFamily(
        f"{PREFIX}_reconnects", "How often it was connected again", labels=labels
    )
    for one in status.processes:
        for name, connection in _needed(one.statistics):
            where = (*_labels(one), name)
            connected.add_metric(where, float(connection.state == "connected"))
            reconnects.add_metric(where, connection.reconnects)
    yield connected
    yield reconnects


def _needed(statistics: LoopLayerStatistics) -> Iterator[tuple[str, ConnectionStatistics]]:
    for name in ("publisher", "subscriber", "carehare_connection", "normal_channels"):
        connection: ConnectionStatistics = getattr(statistics, name)
        if connection.state != "idle":
            yield name, connection


def _labels(one: ProcessStatus) -> tuple[str, str, str]:
    statistics = one.statistics
    return statistics.id, str(statistics.pid), statistics.host
