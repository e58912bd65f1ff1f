"""Import the project's functions that ``CONFIG`` names, and tell async ones from sync ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from asgiref.sync import iscoroutinefunction
from channels.exceptions import InvalidChannelLayerError

F = TypeVar("F", bound=Callable[..., object])


def import_function(
    option: str, path: str, check: Callable[[str, object], F], *, note: str = ""
) -> F:
    """Return the function that a dotted path names, after ``check`` has accepted it.

    Raises InvalidChannelLayerError, whose text ends in ``note``.
    """
    module_name, _, name = path.rpartition(".")
    try:
        return check(option, getattr(importlib.import_module(module_name), name))
    except Exception as err:  # The module may raise any exception.
        raise InvalidChannelLayerError(
            f"{option}: cannot use {path!r}: {type(err).__name__}: {err}{note}"
        ) from err


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call of ``function`` returns at once, and returns an awaitable."""
    return iscoroutinefunction(function) or iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object's method
    )
