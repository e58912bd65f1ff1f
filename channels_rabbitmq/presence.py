"""What ``RabbitmqChannelLayer.group_members()`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Member(NamedTuple):
    """A channel in a group, of any process."""

    channel: str

    info: dict[str, Any] | None
    """What the channel's last ``group_add()`` said of it; the caller's own copy."""


@dataclass(frozen=True)
class GroupMembers:
    """Who is in a group, as far as the processes have answered.

    Strictly, a process is an event loop that uses the layer. It is named by its id, which begins
    the names of its channels. Processes with 4.x aren't asked: their members are missing, and the
    result is complete all the same.
    """

    members: tuple[Member, ...]
    """The members in the processes that answered, this one included, at most once each."""

    is_complete: bool
    """Whether all processes that this one knows have answered. Then ``members`` has each of their
    channels whose ``group_add()`` had returned before the question, unless it has left since.

    There are processes that this one doesn't know. If it has connected for the first time after a
    restart of RabbitMQ, it doesn't know those that haven't come back yet. If it has connected while
    RabbitMQ couldn't deliver to any other, or while all others were busy for more than half a
    second, it doesn't know them for a moment."""

    silent: tuple[str, ...]
    """Ids of processes that are connected and didn't answer in time: they are busy or stuck."""

    absent: tuple[str, ...]
    """Ids of processes that have lost their connection a moment ago, and may be back soon. After
    ten seconds such a process counts as gone, with its members."""
