"""The words of the suite: what is measured, and what one run gives."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.problems import Problems

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
