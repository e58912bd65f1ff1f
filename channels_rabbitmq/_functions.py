"""Functions of a project's that ``CONFIG`` names: imported, and told apart by how to call them."""

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
    """Return what a dotted path names, if ``check`` has nothing against it.

    Raises InvalidChannelLayerError, which ends in ``note``.
    """
    module_name, _, name = path.rpartition(".")
    try:
        return check(option, getattr(importlib.import_module(module_name), name))
    except Exception as err:  # whatever the module does
        raise InvalidChannelLayerError(
            f"{option}: cannot use {path!r}: {type(err).__name__}: {err}{note}"
        ) from err


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call returns at once, and what it returns is to be awaited."""
    return iscoroutinefunction(function) or iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - the method itself: of an object
    )
