"""The form of a process's status in an answer: the dataclasses as maps, of a bounded size.

A field that is missing is read as nothing (0, "", False), and an unknown one is ignored: processes
with different releases may ask each other. Texts are shown on terminals, so they are cut, and what
isn't printable is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

from .._codec import MalformedBody
from ..statistics import LoopLayerStatistics
from ..status import ProcessStatus, WorstChannel

# Characters of a text. With all texts as long as that an answer has 10 kB; 1 kB is usual.
LONGEST_TEXT = 500

_T = TypeVar("_T")


def pack(status: ProcessStatus) -> dict[str, Any]:
    """Return what ``read`` reads."""
    packed: dict[str, Any] = _cut(asdict(status))
    return packed


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cut(one) for name, one in value.items()}
    return value[:LONGEST_TEXT] if isinstance(value, str) else value


def read(value: object, sender: str) -> ProcessStatus:
    """Return what a process says of itself. The only exception is ``MalformedBody``."""
    status = _map(value)
    statistics = _read_dataclass(LoopLayerStatistics, status.get("statistics"))
    if statistics.id != sender:
        raise MalformedBody("a status of another process")
    worst = status.get("worst_channel")
    return ProcessStatus(
        statistics,
        _read_number(status.get("oldest")),
        None if worst is None else _read_dataclass(WorstChannel, worst),
    )


def _read_dataclass(kind: type[_T], value: object) -> _T:
    given = _map(value)
    hints = _hints(kind)  # type: ignore[arg-type]  # a class can be hashed
    return kind(**{name: _read_field(hint, given.get(name)) for name, hint in hints})


def _read_field(hint: Any, value: object) -> object:
    if isinstance(hint, type) and is_dataclass(hint):
        return _read_dataclass(hint, value)
    if hint is float:
        return _read_number(value)
    if value is None:
        return hint()
    if type(value) is not hint or (hint is int and not 0 <= value < 2**63):  # type: ignore[operator]  # an int
        raise MalformedBody("a status with a wrong value")
    return plain(value) if isinstance(value, str) else value


def _read_number(value: object) -> float:
    if value is None:
        return 0.0
    if type(value) not in (int, float) or not 0 <= value < math.inf:  # type: ignore[operator]  # a number
        raise MalformedBody("a status with a wrong value")
    return float(value)  # type: ignore[arg-type]  # as above


def _map(value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MalformedBody("a status with a wrong value")
    return value


@cache
def _hints(kind: type[Any]) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in fields(kind)]


def plain(text: str) -> str:
    """Return a text that a terminal shows as it is: cut, and escaped where it isn't printable."""
    cut = text[:LONGEST_TEXT]
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)
