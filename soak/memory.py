"""Whether the processes' memory stays what it was."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The part of a run that counts as warming up, and at least so many seconds.
_WARM_UP = 0.25
_SHORTEST_WARM_UP = 60.0
# A run shorter than this, in seconds, says nothing about memory.
SHORTEST_RUN = 300.0
# Growth that is still flat, in bytes: the allocator's own, which ends.
_TOLERANCE = 8 * 1024 * 1024

Sample = tuple[float, int]  # moment, bytes


@dataclass(frozen=True)
class Trend:
    """The resident memory of one process, in bytes: after the warm-up and at the end."""

    before: int
    after: int
    highest: int
    per_hour: float  # slope of the line through all samples after the warm-up
    is_flat: bool


def resident(pids: Iterable[int]) -> dict[int, int]:
    """Bytes in use by each of these processes; those that have ended are left out."""
    listing = subprocess.run(
        ["ps", "-o", "pid=,rss=", "-p", ",".join(map(str, pids))], capture_output=True, text=True
    )
    rows = [line.split() for line in listing.stdout.splitlines()]
    return {int(pid): int(kibibytes) * 1024 for pid, kibibytes in rows}


def trend(samples: Sequence[Sample]) -> Trend | None:
    """None if there are too few samples after the warm-up."""
    if len(samples) < 2:
        return None
    start, end = samples[0][0], samples[-1][0]
    warm = start + max(_SHORTEST_WARM_UP, (end - start) * _WARM_UP)
    counting = [sample for sample in samples if sample[0] >= warm]
    if len(counting) < 4:
        return None
    quarter = max(1, len(counting) // 4)
    before = int(statistics.median(size for _, size in counting[:quarter]))
    after = int(statistics.median(size for _, size in counting[-quarter:]))
    slope = statistics.linear_regression(
        [moment for moment, _ in counting], [float(size) for _, size in counting]
    ).slope
    return Trend(
        before=before,
        after=after,
        highest=max(size for _, size in samples),
        per_hour=slope * 3600,
        is_flat=after - before <= _TOLERANCE,
    )
