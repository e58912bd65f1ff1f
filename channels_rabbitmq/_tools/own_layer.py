"""The ``LoopLayer`` of a command, which joins the exchange as one more process."""

from __future__ import annotations

from .._broker.shared import Shared
from .._hooks import HookFunctions
from .._loop_layer import LoopLayer
from .._settings.settings import Settings


def make_loop_layer(settings: Settings) -> LoopLayer:
    """Make one on the running event loop, without the project's hooks: it is none of its processes.

    The caller closes it.
    """
    return LoopLayer(
        settings,
        lambda channel: settings.capacity,
        HookFunctions(None, None),
        Shared(),
        for_sync_code=False,
    )
