"""What a ``LoopLayer`` counts, and what ``statistics()`` tells of it.

Counters only grow; each part of the layer adds to the fields that are its own, on its event loop.
``statistics()`` may be called on any thread, so it reads single numbers and the lengths of dicts,
and never walks through anything.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Running totals of one ``LoopLayer`` since it was made."""

    # Publisher
    published: int = 0  # messages written to the broker, every try counted
    confirmed: int = 0  # taken by the broker
    refused: int = 0  # refused by a full queue, after all tries: sends raised ChannelFull
    refused_by_a_queue: int = 0  # group messages refused by at least one queue
    blocked: int = 0  # not written because the broker blocks publishers
    blocked_groups: int = 0  # those of them that were for groups
    unknown: int = 0  # written, but the connection or the time ended before the confirm
    returned: int = 0  # direct sends that no queue took at a try, though none is full
    unreachable: int = 0  # direct sends dropped: their process is gone
    cancelled: int = 0  # written, but the caller didn't wait for the confirm

    # Subscriber and router
    delivered: int = 0  # deliveries from the broker
    routed: int = 0  # messages put into channels, a group's for each member
    received: int = 0  # messages handed to a receive()
    unwanted: int = 0  # deliveries to groups without members here
    foreign: int = 0  # deliveries for channels of other processes
    malformed: int = 0  # deliveries whose body isn't a channel-layer message
    expired: int = 0  # messages that waited local_expiry seconds in a channel
    overflowed: int = 0  # messages dropped beyond the capacity of a channel that was behind


@dataclass(frozen=True)
class ConnectionStatistics:
    """One connection of a ``LoopLayer``."""

    state: str
    """``"idle"``: nobody needed it yet; ``"connecting"``; ``"connected"``; ``"waiting"``: for the
    next attempt; ``"closed"``: for good."""

    since: float
    """Since when it has been connected, or else since when it hasn't (``"idle"`` and ``"closed"``:
    since when it is so). As ``time.time()`` gives it: seconds since 1970, UTC."""

    url: str
    """Where it is connected to, without the password; ``""`` if it isn't connected."""

    reconnects: int
    """How often it was connected again."""

    last_reason: str
    """Why the last attempt failed, or why the connection was lost; ``""`` if neither happened."""


@dataclass(frozen=True)
class GroupStatistics:
    """The groups of a ``LoopLayer``, now."""

    wanted: int
    """Groups with members."""

    bound: int
    """Groups bound to the queue, as the broker has confirmed; lingering ones included."""

    lingering: int
    """Groups still bound, for a moment, without members."""


@dataclass(frozen=True)
class DroppedStatistics:
    """Messages that a ``LoopLayer`` has dropped, by reason; none raised an error."""

    blocked: int
    """To groups, while the broker blocked publishers."""

    unreachable: int
    """To channels whose process is gone."""

    overflowed: int
    """Of channels that were behind while others waited, beyond their capacity."""

    unwanted: int
    """Deliveries to groups without members here: most often they have just left."""

    foreign: int
    """Deliveries for channels of other processes."""

    malformed: int
    """Deliveries that are not in the layer's format."""


@dataclass(frozen=True)
class LoopLayerStatistics:
    """One event loop's part of the layer. What isn't said to be "now" is a total since its start.

    All values are numbers, strings, booleans, and dataclasses of these.
    """

    id: str
    """With which the names of its channels begin, and its queues'."""

    for_sync_code: bool
    """Whether it serves what ``async_to_sync`` calls, in the background thread."""

    publisher: ConnectionStatistics
    """Sends."""

    subscriber: ConnectionStatistics
    """Receives."""

    carehare_connection: ConnectionStatistics
    """The user's own."""

    is_blocked: bool
    """Whether the broker takes no messages now (an alarm)."""

    # Sent. Once nothing is under way, published is the sum of confirmed, refused,
    # refused_by_a_queue, returned, unknown and cancelled.

    published: int
    """Messages written to the broker. Each try counts, and so do the layer's own probes."""

    confirmed: int
    """Taken by the broker."""

    refused: int
    """Refused by a full queue: ``send()`` raised ``ChannelFull``. (Or it was a probe.) At the first
    tries a refusal counts as ``returned``, until it is known that the queue is full."""

    refused_by_a_queue: int
    """To groups, refused by at least one queue: its process doesn't keep up, or is gone;
    others took them."""

    returned: int
    """To channels, at a try at which no queue took them, for another reason than that it is full:
    there was none, or it was just being deleted."""

    unknown: int
    """The connection or the time ended before the broker's answer: they may or may not arrive."""

    cancelled: int
    """Their callers were cancelled before the broker's answer."""

    blocked: int
    """Not written, since the broker takes no messages: ``send()`` raised ``ChannelFull``, those to
    groups were dropped."""

    unconfirmed: int
    """Now: written, without an answer so far."""

    # Received. routed is the sum of received, expired, dropped.overflowed, waiting and
    # in_handoff.

    delivered: int
    """Deliveries from the broker; a group's message counts once."""

    routed: int
    """Messages put into channels; a group's counts for each member."""

    received: int
    """Returned by ``receive()``."""

    expired: int
    """Dropped: they waited in a channel for ``local_expiry``."""

    dropped: DroppedStatistics
    """Dropped for other reasons."""

    highest_age: float
    """Seconds: how old the oldest message was, since its publishing, that ``receive()`` returned in
    the last half minute or minute. 0 if there was none. By the clocks of the machines."""

    # Now

    waiting: int
    """Messages in channels, for ``receive()``."""

    in_handoff: int
    """Messages on their way to a ``receive()`` on another event loop."""

    channels: int
    """Channels that hold messages, or for which a ``receive()`` waits."""

    receivers: int
    """Calls of ``receive()`` that wait."""

    stalled_channels: int
    """Channels that hold messages which don't count any more: they were behind, while others
    waited, or the connection was lost."""

    unacked: int
    """How much of ``local_capacity`` is in use: deliveries not yet acked."""

    local_capacity: int
    """The option."""

    early_acked_bytes: int
    """Size in memory of what is held without counting: for stalled channels, or since before a
    reconnect."""

    groups: GroupStatistics
    """Its groups."""
