"""What a scenario is, and the numbers that it gives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks.stage import Stage


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
