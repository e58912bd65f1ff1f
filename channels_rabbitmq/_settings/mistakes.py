"""Put several mistakes into one error, so that the user can mend all of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

_Name = TypeVar("_Name")
_T = TypeVar("_T")


class Mistakes(ValueError):
    """One or several mistakes, and notes about valid options; the text has a line for each."""

    def __init__(self, found: Sequence[str], notes: Sequence[str] = ()) -> None:
        self.found = tuple(found)
        number = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        lines = [*found, *(f"note: {note}" for note in notes)]
        super().__init__(
            lines[0] if len(lines) == 1 else "\n- ".join([f"{number} in CONFIG:", *lines])
        )


@contextlib.contextmanager
def collected(mistakes: list[str]) -> Iterator[None]:
    """Add the text of a ``ValueError`` in the block to ``mistakes`` instead of raising it."""
    try:
        yield
    except Mistakes as exc:
        mistakes += exc.found
    except ValueError as exc:
        mistakes.append(str(exc))


def read_each(
    read: Callable[[_Name, object], _T], named_values: Iterable[tuple[_Name, object]]
) -> list[_T]:
    """Return the results of ``read`` for all names and values; raise all ``Mistakes`` at once."""
    mistakes: list[str] = []
    results: list[_T] = []
    for name, value in named_values:
        with collected(mistakes):
            results.append(read(name, value))
    if mistakes:
        raise Mistakes(mistakes)
    return results
