"""What this project's layer is meant to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import problems
from benchmarks.figures import Cell, find_figure
from benchmarks.model import OLD, OURS, RAW, RAW_CHANNELS, RAW_SHORT, REDIS_CORE, REDIS_PUBSUB

Cells = Mapping[tuple[str, str], Cell]

_OTHERS = {
    OLD: "channels_rabbitmq 4.0.1",
    REDIS_CORE: "channels_redis core",
    REDIS_PUBSUB: "channels_redis pubsub",
    RAW: "the raw client",
    RAW_CHANNELS: "the raw client with channels",
    RAW_SHORT: "the raw client by the shortest way",
}


@dataclass(frozen=True)
class Aim:
    """``measure`` gives ``None`` if it can't be told: something was not run, or has failed.

    ``scenario`` is "" if it is about all of them.
    """

    scenario: str
    what: str
    limit: float
    is_minimum: bool
    measure: Callable[[Cells], float | None]

    @property
    def text(self) -> str:
        return f"{self.scenario or 'all scenarios'}: {self.what}"

    def verdict(self, cells: Cells) -> str | None:
        """ "reached", "missed", or ``None`` if it wasn't measured."""
        value = self.measure(cells)
        if value is not None:
            is_reached = value >= self.limit if self.is_minimum else value <= self.limit
            return "reached" if is_reached else "missed"
        ours = cells.get((self.scenario, OURS))
        if ours is not None and not ours.figures:
            return "missed"  # all runs of it have failed
        return None


def _median(cells: Cells, scenario: str, layer: str, key: str) -> float | None:
    figure = find_figure(cells, scenario, layer, key)
    return figure.median if figure is not None else None


def _ratio(
    scenario: str, key: str, what: str, limit: float, *, to: str = OLD, less: bool = False
) -> Aim:
    """At least (at most, if less is better) so many times what another layer has."""

    def measure(cells: Cells) -> float | None:
        ours, other = _median(cells, scenario, OURS, key), _median(cells, scenario, to, key)
        return ours / other if ours is not None and other else None

    return Aim(scenario, f"{what}, times that of {_OTHERS[to]}", limit, not less, measure)


def _value(scenario: str, key: str, what: str, limit: float) -> Aim:
    return Aim(scenario, what, limit, False, lambda cells: _median(cells, scenario, OURS, key))


def _least(scenario: str, key: str, what: str, limit: float) -> Aim:
    return Aim(scenario, what, limit, True, lambda cells: _median(cells, scenario, OURS, key))


def _worst(scenario: str, key: str, what: str, limit: float) -> Aim:
    """In any run, so the greatest instead of the median."""

    def measure(cells: Cells) -> float | None:
        figure = find_figure(cells, scenario, OURS, key)
        return figure.high if figure is not None else None

    return Aim(scenario, f"{what}, in any run", limit, False, measure)


def _failures(scenario: str) -> Aim:
    def measure(cells: Cells) -> float | None:
        cell = cells.get((scenario, OURS))
        return float(len(cell.failures)) if cell is not None else None

    return Aim(scenario, "runs that failed", 0, False, measure)


def _client_us(cells: Cells) -> float | None:
    sender = _median(cells, "throughput-100", OURS, "sender_us")
    receiver = _median(cells, "throughput-100", OURS, "receiver_us")
    return sender + receiver if sender is not None and receiver is not None else None


def _harm(cells: Cells) -> float | None:
    """Refusals aren't counted: the sender was told that it isn't delivered."""
    ours = [cell for (_, layer), cell in cells.items() if layer == OURS]
    if not ours:
        return None
    problems_counted = sum(
        times
        for cell in ours
        for kind, (times, _) in cell.problems.items()
        if kind != problems.REFUSED
    )
    return float(problems_counted + sum(len(cell.failures) for cell in ours))


def _reconnect(scenario: str) -> tuple[Aim, ...]:
    return (
        _value(scenario, "direct_s", "direct sends arrive again after, s", 0.5),
        _value(scenario, "ratio", "last group, times an idle broker's bind", 2.5),
        _worst(scenario, "confirm_s", "longest confirm meanwhile, s", 1),
    )


AIMS = (
    _ratio("throughput-100", "delivered", "deliveries/s", 7),
    _ratio("throughput-10k", "delivered", "deliveries/s", 6),
    _ratio("throughput-100", "delivered", "deliveries/s", 0.85, to=RAW),
    _ratio("throughput-10k", "delivered", "deliveries/s", 0.85, to=RAW),
    _ratio("throughput-100", "delivered", "deliveries/s", 0.85, to=RAW_CHANNELS),
    _ratio("throughput-10k", "delivered", "deliveries/s", 0.85, to=RAW_CHANNELS),
    _ratio("throughput-100", "delivered", "deliveries/s", 0.85, to=RAW_SHORT),
    _ratio("throughput-10k", "delivered", "deliveries/s", 0.85, to=RAW_SHORT),
    Aim("throughput-100", "sender and receiver, µs CPU per message", 45, False, _client_us),
    _ratio("latency", "round_trips", "round trips/s", 2),
    _ratio("latency", "round_trips", "round trips/s", 1, to=REDIS_PUBSUB),
    _ratio("fanout-burst", "deliveries", "deliveries/s", 10),
    _ratio("fanout-burst", "deliveries", "deliveries/s", 1, to=REDIS_PUBSUB),
    _ratio("fanout-paced", "deliveries", "deliveries/s", 2.2),
    _ratio("fanout-paced", "deliveries", "deliveries/s", 1, to=REDIS_PUBSUB),
    # One pair of numbers for churn; both kinds are held to it.
    _ratio("churn", "ops", "ops/s", 2.3),
    _ratio("churn", "ops", "ops/s", 1, to=REDIS_PUBSUB),
    _ratio("churn-distinct", "ops", "ops/s", 2.3),
    _ratio("churn-distinct", "ops", "ops/s", 1, to=REDIS_PUBSUB),
    _ratio("storm-2000", "seconds", "seconds", 0.5, less=True),
    _failures("storm-10000"),
    *_reconnect("reconnect-clean"),
    *_reconnect("reconnect-half-open"),
    _ratio("memory-channels", "mib", "MiB", 0.5, less=True),
    _least("sync", "calls", "calls/s", 500),
    _ratio("sync", "calls", "calls/s", 3, to=REDIS_PUBSUB),
    _ratio("jobs", "jobs", "jobs/s", 1, to=REDIS_CORE),
    *(
        _worst(scenario, "lost", "lost, %", 0)
        for scenario in ("site-turn", "site-burst", "site-room", "neighbours")
    ),
    _value("neighbours", "more_ms", "prompt channels wait more at p99, ms", 50),
    Aim("", "lost, duplicated, damaged, shared, errors, hangs, failed runs", 0, False, _harm),
)
