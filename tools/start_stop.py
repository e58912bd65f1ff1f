"""``StartStop``: a ``with`` block for what has ``start()`` and ``stop()``."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

_Self = TypeVar("_Self", bound="StartStop")


class StartStop:
    """Runs while it is entered."""

    def start(self) -> None:
        """Returns when it can be used, or raises."""
        raise NotImplementedError

    def stop(self) -> None:
        """Leaves nothing behind. May be called at any time, and twice."""
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        try:
            self.start()
        except BaseException:  # Ctrl-C, too
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
