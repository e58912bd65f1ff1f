"""What ``RabbitmqChannelLayer.status()`` returns.

All values are numbers, strings, booleans, and tuples and dataclasses of these. Texts that come from
other processes hold no control characters.
"""

from __future__ import annotations

from dataclasses import dataclass

from .statistics import LoopLayerStatistics


@dataclass(frozen=True)
class WorstChannel:
    """The channel whose oldest message has waited longest in the memory of its process."""

    name: str

    messages: int
    """How many it holds."""

    description: str
    """The class of its consumer and its groups, as far as they are known. Empty, too, if no message
    has waited for longer than a second."""


@dataclass(frozen=True)
class ProcessStatus:
    """What a process, strictly an event loop that uses the layer, has answered."""

    statistics: LoopLayerStatistics

    oldest: float
    """Seconds for which the oldest message has waited in memory; 0 if there is none."""

    worst_channel: WorstChannel | None
    """None if no channel holds a message."""


@dataclass(frozen=True)
class MissingProcess:
    """A process that hasn't answered, and what others know of it."""

    id: str

    heard_ago: float | None
    """Seconds since any process has heard it; None if none of them has."""

    pid: int
    """0 if nobody knows it."""

    host: str
    """Empty if nobody knows it."""


@dataclass(frozen=True)
class Status:
    """All processes that use this layer's exchange, as far as they can be asked.

    A process can be asked once it receives: it has called ``new_channel()``, ``receive()``,
    ``group_add()`` or ``connect()``. Processes with 4.x can't be asked.
    """

    processes: tuple[ProcessStatus, ...]
    """Those that have answered, and the one that asked, in the order in which they began."""

    silent: tuple[MissingProcess, ...]
    """Those that are connected and haven't answered in time: their event loops are blocked or
    busy. Nobody is named while ``is_blocked``."""

    absent: tuple[MissingProcess, ...]
    """Those that have lost their connection a moment ago. After ten seconds they count as gone."""

    is_complete: bool
    """Whether all have answered that are known: see ``GroupMembers.is_complete``. False while
    ``is_blocked``."""

    is_blocked: bool = False
    """Whether RabbitMQ takes no messages (an alarm) of the one that asked. Then processes can't be
    asked, and that one hasn't answered says nothing about it."""

    lost: tuple[MissingProcess, ...] = ()
    """Those that went without a goodbye in the last ten minutes and haven't come back: they were
    killed or cut off, or are blocked or stopped for so long that RabbitMQ has closed their
    connections."""
