"""What ``RabbitmqChannelLayer.statistics()`` returns.

Counters only grow; each part of the layer adds to the fields that are its own, on its event loop.
``statistics()`` may be called on any thread, so it reads single numbers and the lengths of dicts,
and never walks through anything.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Totals since an event loop's first call. ``statistics()`` returns a copy.

    Sent: when no message is under way, ``published`` is the sum of ``confirmed``, ``nacked``,
    ``group_nacked``, ``returned``, ``outcome_unknown`` and ``cancelled``. Received: ``enqueued`` is
    the sum of ``consumed``, ``expired``, ``overflowed``, ``flushed`` and the messages that are
    ``buffered`` or ``in_hand_over`` now.
    """

    published: int = 0
    """Messages written to the broker. Each try counts, and so do the layer's own probes."""

    confirmed: int = 0
    """Messages that the broker has taken."""

    nacked: int = 0
    """Messages for channels, and probes, refused by a full queue: ``send()`` raised
    ``ChannelFull``. At the first tries a refusal counts as ``returned``, until the layer knows that
    the queue is full."""

    group_nacked: int = 0
    """Messages for groups, refused by at least one queue. Its process doesn't keep up, or is gone.
    Other processes took them."""

    returned: int = 0
    """Tries to send to a channel which no queue took, for another reason than that it is full:
    there was none, or the broker was just deleting it."""

    outcome_unknown: int = 0
    """Messages written before the connection or the time ended: they may or may not arrive."""

    cancelled: int = 0
    """Messages written whose caller was cancelled before the broker's answer."""

    blocked: int = 0
    """Messages not written, because the broker takes none: ``send()`` raised ``ChannelFull``,
    those for groups were dropped."""

    blocked_groups: int = 0
    """Those of ``blocked`` that were for groups."""

    unreachable: int = 0
    """Messages dropped because the process of their channel is gone."""

    delivered: int = 0
    """Deliveries from the broker, but for those of normal channels. A group's message counts
    once."""

    malformed: int = 0
    """Deliveries dropped because they are not in the layer's format."""

    misrouted: int = 0
    """Deliveries dropped because they were for channels of other processes."""

    no_members: int = 0
    """Deliveries dropped because the group had no members here: most often they have just left."""

    enqueued: int = 0
    """Messages put into channels. A group's message counts for each member."""

    consumed: int = 0
    """Messages that ``receive()`` returned."""

    expired: int = 0
    """Messages dropped because they waited in a channel for ``local_expiry``."""

    overflowed: int = 0
    """Messages dropped beyond the capacity of a channel that was behind while others waited."""

    flushed: int = 0
    """Messages in channels that ``flush()`` dropped."""

    requests: int = 0
    """What the layer has told or asked other processes, or answered them: written to the broker,
    each try counts. These don't count as ``published``."""

    questions: int = 0
    """Calls of ``group_members()`` and ``group_count()`` that returned."""

    incomplete: int = 0
    """Those of them whose result wasn't complete."""

    silent: int = 0
    """Answers that were missing in these, of processes that are connected."""

    answered: int = 0
    """Requests of other processes that were done here."""

    unanswered: int = 0
    """Requests of other processes that were dropped: the broker took no answers, too many were
    under way, or a question's time was over."""

    malformed_requests: int = 0
    """Requests dropped because they are not in the layer's format, or have another key."""

    normal_consumed: int = 0
    """Messages of normal channels that ``receive()`` returned. They count nowhere else."""


@dataclass(frozen=True)
class ProcessStatistics:
    """The other processes, strictly the other event loops that use the layer, now."""

    known: int
    """Those that this one has heard of, and that haven't ended."""

    absent: int
    """Those of them that had no connection when they were asked last."""


@dataclass(frozen=True)
class ConnectionStatistics:
    """One connection of a ``LoopLayer``."""

    state: str
    """``"idle"``: it was not needed yet; ``"connecting"``; ``"connected"``; ``"waiting"``: for the
    next attempt; ``"closed"``: for good."""

    since: float
    """Since when it has been connected, or else since when it hasn't (``"idle"`` and ``"closed"``:
    since when it is so). As ``time.time()`` gives it: seconds since 1970, UTC."""

    url: str
    """The URL it is connected to, without the password; ``""`` if it isn't connected."""

    reconnects: int
    """How often it was connected again."""

    last_reason: str
    """Why the last attempt failed, or why the connection was lost; ``""`` if neither happened."""


@dataclass(frozen=True)
class GroupStatistics:
    """The groups of a ``LoopLayer``, now."""

    required: int
    """Groups with members."""

    bound: int
    """Groups bound to the queue, as the broker has confirmed; lingering ones included."""

    lingering: int
    """Groups still bound, for a moment, without members."""


@dataclass(frozen=True)
class LoopLayerStatistics:
    """One event loop's part of the layer, now; the totals are in ``counters``.

    All values are numbers, strings, booleans, and dataclasses of these.
    """

    id: str
    """The names of its channels and queues begin with it."""

    pid: int
    """The process's id, as the operating system numbers them (in a container: the container)."""

    host: str
    """The machine's or container's name."""

    since: float
    """When this event loop began to use the layer. As ``time.time()`` gives it: seconds since 1970,
    UTC."""

    for_sync_code: bool
    """Whether it serves sync code, which calls by ``async_to_sync``, in the background thread."""

    publisher: ConnectionStatistics
    """The connection that sends."""

    subscriber: ConnectionStatistics
    """The connection that receives."""

    carehare_connection: ConnectionStatistics
    """The connection for the user's own queues."""

    normal_channels: ConnectionStatistics
    """The connection that receives from normal channels."""

    counters: Counters
    """Totals since its first call."""

    is_blocked: bool
    """Whether the broker takes no messages (an alarm)."""

    unconfirmed: int
    """Messages written, without an answer so far."""

    highest_age: float
    """Seconds since the publishing of the oldest message that ``receive()`` returned in the last
    half minute or minute, when it was returned. 0 if there was none. By the machines' clocks."""

    loop_lag: float
    """Seconds for which the event loop was blocked, at the longest, in the last half minute or
    minute, ``loop_late`` included. A little more than 0 is usual."""

    loop_late: float
    """By how many seconds the event loop is late now, with what is due on it. Another thread that
    asks sees here that it is blocked. 0 for a loop that has stopped."""

    buffered: int
    """Messages in channels, for ``receive()``."""

    in_hand_over: int
    """Messages on their way to a ``receive()`` on another event loop."""

    channels: int
    """Channels that hold messages, or for which a ``receive()`` waits."""

    receivers: int
    """Calls of ``receive()`` that wait."""

    stalled_channels: int
    """Channels that hold messages which don't count as ``unacked``: the channel was behind while
    others waited, or the connection was lost."""

    unacked: int
    """Deliveries not yet acked: how much of ``local_capacity`` is in use."""

    local_capacity: int
    """The option: the most that ``unacked`` can be."""

    early_acked_bytes: int
    """Size in memory of the messages that don't count as ``unacked``: those of stalled channels,
    and those that were held when the connection was lost."""

    groups: GroupStatistics
    """Its groups."""

    processes: ProcessStatistics
    """The other processes."""
