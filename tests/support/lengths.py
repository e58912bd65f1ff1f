"""How long the long tests last: briefly, unless pytest is run with ``--full``."""

from __future__ import annotations

from dataclasses import dataclass

_is_full = False


def use_full_lengths() -> None:
    """From now on every ``Length`` has its full value: what ``pytest --full`` does."""
    global _is_full
    _is_full = True


@dataclass(frozen=True)
class Length:
    """A duration in seconds, or a number of things: a constant of a test module.

        _STORM = Length(full=60.0, brief=4.0)

    A test asks for ``_STORM.value`` when it runs. Its time limit must do for the brief one; with
    ``--full`` comes another ``--timeout`` (so don't mark such a test with one of its own).
    """

    full: float
    brief: float

    @property
    def value(self) -> float:
        return self.full if _is_full else self.brief

    @property
    def count(self) -> int:
        return int(self.value)
