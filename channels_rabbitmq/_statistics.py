"""What a ``LoopLayer`` counts.

Counters only grow; each part of the layer adds to the fields that are its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Running totals of one ``LoopLayer`` since it was made."""

    # Publisher
    published: int = 0  # messages written to the broker, every try counted
    confirmed: int = 0  # taken by the broker
    refused: int = 0  # refused by a full queue: sends raised ChannelFull
    refused_by_a_queue: int = 0  # group messages refused by at least one queue
    blocked: int = 0  # not written because the broker blocks publishers
    unknown: int = 0  # written, but the connection or the time ended before the confirm
    returned: int = 0  # direct sends that reached no queue at a try
    unreachable: int = 0  # direct sends dropped: their process is gone

    # Subscriber and router
    delivered: int = 0  # deliveries from the broker
    received: int = 0  # messages handed to a receive()
    unwanted: int = 0  # deliveries that no channel here wanted
    malformed: int = 0  # deliveries whose body isn't a channel-layer message
    expired: int = 0  # messages that waited local_expiry seconds in a channel
    overflowed: int = 0  # messages of a stalled channel dropped beyond its capacity
