"""Many numbers made few: percentiles, medians with their range, sums of problems."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.model import Sample
from benchmarks.problems import Problems, add_problems


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of ``values`` that at least ``percent`` % of them don't exceed."""
    if not values:
        raise ValueError("no values")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


@dataclass(frozen=True)
class Figure:
    """The median of several runs, and the smallest and greatest of them."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Cell:
    """All runs of one scenario on one layer."""

    figures: Mapping[str, Figure]  # by the metric's key; empty if every run failed
    problems: Problems
    failures: Sequence[str]  # the texts of the runs that failed
    runs: int


def summarize(samples: Iterable[Sample]) -> dict[tuple[str, str], Cell]:
    """One cell for each (scenario, layer) that was run."""
    grouped: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        grouped.setdefault((sample.scenario, sample.layer), []).append(sample)
    return {key: _cell(group) for key, group in grouped.items()}


def _cell(samples: list[Sample]) -> Cell:
    values: dict[str, list[float]] = {}
    problems: Problems = {}
    for sample in samples:
        add_problems(problems, sample.problems)
        for key, value in sample.metrics.items():
            values.setdefault(key, []).append(value)
    return Cell(
        figures={key: Figure.of(each) for key, each in values.items()},
        problems=problems,
        failures=[sample.failure for sample in samples if sample.failure],
        runs=len(samples),
    )


def find_figure(
    cells: Mapping[tuple[str, str], Cell], scenario: str, layer: str, key: str
) -> Figure | None:
    """``None`` if there is none: not run, or failed."""
    cell = cells.get((scenario, layer))
    return cell.figures.get(key) if cell is not None else None
