"""The status of all processes as lines of text, and whether it is well.

A process has one line, and one more for each thing that is wrong with it. Texts of other processes
were cleaned when they were read (``_peers/statuses.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..statistics import ConnectionStatistics, LoopLayerStatistics
from ..status import MissingProcess, ProcessStatus, Status

# Seconds that a message waits until its channel is shown, and until that counts as a fault.
BEHIND = 1.0
STUCK = 10.0
# Seconds for which an event loop was blocked lately, from which on that counts as a fault: the log
# tells it, too, and what other processes ask is late.
LAGGING = 1.0

_HEADS = ("ID", "PID", "HOST", "UP", "CONN", "GROUPS", "WAITING", "STALLED", "OLDEST", "LAG")
_HOST = _HEADS.index("HOST")
_LEFT = {"ID", "HOST"}
_SHORTEST_HOST, _LONGEST_HOST = 6, 40
_INDENT = "    "
_ALARM = (
    "RabbitMQ takes no messages (an alarm), so processes can't be asked, before it",
    "has more free memory or disk space: `rabbitmq-diagnostics alarms` tells which.",
)

Row = tuple[str, ...]


def is_well(status: Status) -> bool:
    """Whether all have answered, and none is at fault."""
    return status.is_complete and not (status.absent or any(map(is_at_fault, status.processes)))


def is_at_fault(process: ProcessStatus) -> bool:
    """Whether a process that has answered needs somebody to look at it."""
    statistics = process.statistics
    is_stuck = statistics.stalled_channels > 0 or process.oldest >= STUCK
    is_slow = statistics.loop_lag >= LAGGING
    return is_stuck or is_slow or statistics.is_blocked or bool(_lost(statistics))


def draw(status: Status, now: float, width: int) -> list[str]:
    """Return a sentence about all, and then the table, for a terminal of so many columns.

    What is wrong comes first. ``now``: as ``time.time()``.
    """
    processes = sorted(status.processes, key=_place)
    processes.sort(key=is_at_fault, reverse=True)
    missing = [
        *((one, "doesn't answer") for one in status.silent),
        *((one, "has lost its connection") for one in status.absent),
        *((one, "is gone without a goodbye: killed, stopped or blocked") for one in status.lost),
    ]
    notes = [cut(text, width) for text in _ALARM] if status.is_blocked else []
    if not processes and not missing:
        return [_summary(status), *(notes or ["No process that receives uses this exchange."])]
    rows = [_row(process, now) for process in processes]
    starts = [(one.id, str(one.pid or "?"), one.host or "?") for one, _ in missing]
    widths = _widths([_HEADS, *rows, *starts], width)
    lines = [_summary(status), *notes, _line(_HEADS, widths)]
    for start, (one, what) in zip(starts, missing, strict=True):
        lines.append(f"{_line(start, widths)} {what}; {_heard(one)}")
    for row, process in zip(rows, processes, strict=True):
        lines.append(_line(row, widths))
        lines.extend(cut(f"{_INDENT}{text}", width) for text in _remarks(process, now))
    return lines


def first_lines(lines: list[str], count: int) -> list[str]:
    """Return so many lines, at least one; the last one tells how many more there are."""
    if len(lines) <= count:
        return lines
    kept = lines[: max(0, count - 1)]
    return [*kept, f"... {len(lines) - len(kept)} more lines"]


def _summary(status: Status) -> str:
    parts = [_count(len(status.processes), "process answers", "processes answer")]
    at_fault = sum(map(is_at_fault, status.processes))
    for number, what in ((at_fault, "at fault"), (len(status.silent), "silent")):
        if number:
            parts.append(f"{number} {what}")
    if status.absent:
        parts.append(f"{len(status.absent)} without a connection")
    if status.lost:
        parts.append(f"{len(status.lost)} gone without a goodbye")
    if status.is_blocked:
        parts.append("RabbitMQ takes no messages")
    elif not status.is_complete and not status.silent:
        parts.append("perhaps not all are known yet")
    return ", ".join(parts)


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _place(process: ProcessStatus) -> tuple[str, int, str]:
    statistics = process.statistics
    return statistics.host, statistics.pid, statistics.id


def _row(process: ProcessStatus, now: float) -> Row:
    statistics = process.statistics
    return (
        statistics.id,
        str(statistics.pid),
        statistics.host,
        short(now - statistics.since),
        _connections(statistics),
        str(statistics.groups.required),
        str(statistics.buffered),
        str(statistics.stalled_channels),
        short(process.oldest) if process.worst_channel else "-",
        short(statistics.loop_lag),
    )


def _named_connections(statistics: LoopLayerStatistics) -> dict[str, ConnectionStatistics]:
    return {
        "publisher": statistics.publisher,
        "subscriber": statistics.subscriber,
        "normal_channels": statistics.normal_channels,
        "carehare_connection": statistics.carehare_connection,
    }


def _connections(statistics: LoopLayerStatistics) -> str:
    """Return how many are open, and of how many if that isn't all."""
    lost = len(_lost(statistics))
    states = [one.state for one in _named_connections(statistics).values()]
    open_ones = states.count("connected")
    return f"{open_ones}/{open_ones + lost}" if lost else str(open_ones)


def _lost(statistics: LoopLayerStatistics) -> dict[str, ConnectionStatistics]:
    """Return those that are needed and not there."""
    return {
        name: one
        for name, one in _named_connections(statistics).items()
        if one.state in ("connecting", "waiting")
    }


def _remarks(process: ProcessStatus, now: float) -> list[str]:
    statistics = process.statistics
    remarks = [
        f"{name}: no connection for {short(now - one.since)}: {one.last_reason or one.state}"
        for name, one in _lost(statistics).items()
    ]
    if statistics.is_blocked:
        remarks.append("RabbitMQ takes no messages: it is low on memory or disk space")
    if statistics.loop_lag >= LAGGING:
        remarks.append(f"its event loop was blocked for {short(statistics.loop_lag)}")
    worst = process.worst_channel
    if worst is not None and (statistics.stalled_channels or process.oldest >= BEHIND):
        messages = _count(worst.messages, "message", "messages")
        about = f" ({worst.description})" if worst.description else ""
        # The id, with which the name begins, is in the line above.
        remarks.append(f"!{worst.name.partition('!')[2]}: {messages}{about}")
    return remarks


def _heard(one: MissingProcess) -> str:
    return "heard by nobody" if one.heard_ago is None else f"last heard {short(one.heard_ago)} ago"


def _widths(rows: Sequence[Row], width: int) -> list[int]:
    """Return the width of each column: what it needs, but for the host, which gets the rest."""
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(len(_HEADS))]
    rest = width - sum(widths) + widths[_HOST] - len(widths) + 1
    widths[_HOST] = min(widths[_HOST], max(_SHORTEST_HOST, min(rest, _LONGEST_HOST)))
    return widths


def _line(row: Row, widths: Sequence[int]) -> str:
    cells = zip(_HEADS, row, widths, strict=False)
    return " ".join(
        cut_middle(cell, width).ljust(width) if head in _LEFT else cell.rjust(width)
        for head, cell, width in cells
    )


def cut(text: str, width: int) -> str:
    """Return a text, without its end if that is too long."""
    return text if len(text) <= width else f"{text[: width - 2]}.."


def cut_middle(text: str, width: int) -> str:
    """Return a text without its middle if it is too long: names of hosts differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 2) // 2
    return f"{text[: width - 2 - tail]}..{text[len(text) - tail :]}"


def short(seconds: float) -> str:
    """Return a time in four characters or five: 0.4s, 41s, 12m, 5h, 30d."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    for unit, length in (("s", 1), ("m", 60), ("h", 3600)):
        if round(seconds / length) < 100:
            return f"{round(seconds / length)}{unit}"
    return f"{round(seconds / 86400)}d"
