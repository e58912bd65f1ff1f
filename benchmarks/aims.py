"""What this project's layer is meant to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from figures import Cell, median, ratio
from model import OLD, OURS, RAW, REDIS_PUBSUB

Cells = Mapping[tuple[str, str], Cell]


@dataclass(frozen=True)
class Aim:
    """``measure`` gives ``None`` if it can't be told: something was not run, or has failed."""

    text: str
    limit: float
    is_minimum: bool
    measure: Callable[[Cells], float | None]

    def is_reached(self, value: float) -> bool:
        return value >= self.limit if self.is_minimum else value <= self.limit


def _ratio(scenario: str, key: str, limit: float, *, to: str = OLD, less: bool = False) -> Aim:
    name = {
        OLD: "channels_rabbitmq 4.0.1",
        REDIS_PUBSUB: "channels_redis pubsub",
        RAW: "the raw client",
    }[to]

    def measure(cells: Cells) -> float | None:
        # Of times and sizes too: how many times better than the other.
        if less:
            value, other = median(cells, scenario, to, key), median(cells, scenario, OURS, key)
            return value / other if value is not None and other else None
        return ratio(cells, scenario, OURS, key, to=to)

    return Aim(f"{scenario}: times as good as {name}", limit, True, measure)


def _value(scenario: str, key: str, what: str, limit: float) -> Aim:
    return Aim(
        f"{scenario}: {what}", limit, False, lambda cells: median(cells, scenario, OURS, key)
    )


def _client_us(cells: Cells) -> float | None:
    sender = median(cells, "throughput-100", OURS, "sender_us")
    receiver = median(cells, "throughput-100", OURS, "receiver_us")
    return sender + receiver if sender is not None and receiver is not None else None


def _problems(cells: Cells) -> float | None:
    ours = [cell for (_, layer), cell in cells.items() if layer == OURS]
    if not ours:
        return None
    return float(
        sum(times for cell in ours for times, _ in cell.problems.values())
        + sum(len(cell.failures) for cell in ours)
    )


AIMS = (
    _ratio("throughput-100", "delivered", 7),
    _ratio("throughput-10k", "delivered", 6),
    _ratio("throughput-100", "delivered", 0.85, to=RAW),
    _ratio("throughput-10k", "delivered", 0.85, to=RAW),
    Aim("throughput-100: sender and receiver, µs CPU per message", 45, False, _client_us),
    _ratio("latency", "round_trips", 2),
    _ratio("latency", "round_trips", 1, to=REDIS_PUBSUB),
    _ratio("fanout-burst", "deliveries", 10),
    _ratio("fanout-burst", "deliveries", 1, to=REDIS_PUBSUB),
    _ratio("fanout-paced", "deliveries", 2.2),
    _ratio("fanout-paced", "deliveries", 1, to=REDIS_PUBSUB),
    _ratio("churn", "ops", 2.3),
    _ratio("churn", "ops", 1, to=REDIS_PUBSUB),
    _ratio("storm-2000", "seconds", 2, less=True),
    _value("storm-10000", "seconds", "seconds until all have joined", 10),
    _value("reconnect-clean", "direct_s", "seconds until direct sends are back", 0.5),
    _value("reconnect-clean", "ratio", "last group, times the idle bind", 2.5),
    _value("reconnect-clean", "confirm_s", "longest confirm meanwhile, s", 1),
    _value("reconnect-half-open", "direct_s", "seconds until direct sends are back", 0.5),
    _value("reconnect-half-open", "ratio", "last group, times the idle bind", 2.5),
    _value("reconnect-half-open", "confirm_s", "longest confirm meanwhile, s", 1),
    _ratio("memory-channels", "mib", 2, less=True),
    Aim("messages lost, refused, damaged, and runs failed, in all scenarios", 0, False, _problems),
)
