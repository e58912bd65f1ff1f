"""The words of the suite: what a scenario is, and what one run of it gives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.stage import Stage

# What can be measured, with the names of the modules in layers/
OURS = "ours"
OLD = "rabbitmq_4"
REDIS_CORE = "redis_core"
REDIS_PUBSUB = "redis_pubsub"
RAW = "raw"
RAW_CHANNELS = "raw_channels"
RAW_SHORT = "raw_short"
# In the order of all tables and charts; also the order of the runs
LAYERS = (OURS, OLD, REDIS_CORE, REDIS_PUBSUB, RAW_CHANNELS, RAW, RAW_SHORT)
CHANNEL_LAYERS = (OURS, OLD, REDIS_CORE, REDIS_PUBSUB)

# On RabbitMQ, each layer's exchange for groups. They don't go by themselves, so they are deleted.
EXCHANGES = {OURS: "benchmark-ours", OLD: "benchmark-4", RAW: "benchmark-raw"}

# What went wrong in a run, short of ending it: {"lost": (3, ""), "RuntimeError": (955, "its text")}
Problems = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Metric:
    """One number that a run gives, and a column of its table."""

    key: str
    heading: str  # with its unit
    digits: int = 0  # behind the decimal point
    # Set for the metrics that layers are compared by.
    more_is_better: bool | None = None


@dataclass(frozen=True)
class Scenario:
    """Something to be measured on several layers, each run in processes of its own.

    ``run`` does it once and returns a value for each metric it could take. It raises ``Failed`` if
    the layer can't do it at all.
    """

    name: str
    title: str
    metrics: tuple[Metric, ...]  # the first is the one in the chart
    layers: tuple[str, ...]
    run: Callable[[Stage], Awaitable[dict[str, float]]]
    time_limit: float = 60.0  # seconds for one run; then its processes are killed
    at_defaults: bool = False  # the layers have their own default capacities, not roomy ones
    by_hand: bool = False  # run only where its whole name is given

    def is_wanted(self, names: Sequence[str] | None) -> bool:
        """Whether it is one of those asked for; the beginning of a name is enough."""
        if self.by_hand:
            return self.name in (names or ())
        return names is None or any(map(self.name.startswith, names))


class Failed(Exception):
    """The layer did not do what the scenario asks for; the text says what happened instead."""


@dataclass
class Sample:
    """One run of a scenario on one layer."""

    scenario: str
    layer: str
    metrics: dict[str, float] = field(default_factory=dict)
    problems: Problems = field(default_factory=dict)
    failure: str = ""  # why there are no metrics
    seconds: float = 0.0  # that the run took, with starting and stopping its processes
