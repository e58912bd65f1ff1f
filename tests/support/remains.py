"""What calls have left in a layer's parts, when all of them have ended."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.layers import inside


def remains(layer: RabbitmqChannelLayer) -> dict[str, int]:
    """What the running event loop's part of a layer holds, by kind; nothing that is zero.

    A layer that nobody is using any more holds nothing, once the linger of its groups is over. (Its
    connections and its queue stay.)
    """
    loop_layer: Any = inside(layer)
    router, bindings = loop_layer.router, loop_layer.bindings
    publisher = loop_layer.publisher._amqp_channel
    found = {
        "mailboxes": router.channels,
        "messages": router.buffered,
        "messages in hand-off": len(router.hand_overs),
        "deliveries unacked": router.unacked,
        "receivers": router.receivers,
        "groups with members": len(list(loop_layer.members.groups())),
        "groups wanted": bindings.required,
        "groups bound": bindings.bound,
        "groups lingering": bindings.lingering,
        "binds and unbinds outstanding": bindings.outstanding,
        "calls that wait for a bind": len(loop_layer.subscriber._waiters),
        "unconfirmed messages": publisher.unconfirmed if publisher is not None else 0,
        "locks of routes": len(loop_layer._sender.direct_sender.locks),
    }
    return {kind: count for kind, count in found.items() if count}


async def until_nothing_remains(layer: RabbitmqChannelLayer, *, timeout: float = 20.0) -> None:
    """Wait for confirms, unbinds and the linger; then fail with what is left."""
    deadline = asyncio.get_running_loop().time() + timeout
    while (left := remains(layer)) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - none of these tells when it goes
        await asyncio.sleep(0.05)
    assert left == {}


def pending_futures() -> int:
    """How many futures and tasks exist that aren't done."""
    gc.collect()
    # By type(): some objects of others don't like to be asked for their class.
    return sum(
        issubclass(type(found), asyncio.Future) and not found.done() for found in gc.get_objects()
    )
