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

    A process is, strictly, an event loop that uses the layer; it is named by its id, with which the
    names of its channels begin. Processes with 4.x aren't asked, so their members are missing and
    make no result incomplete.
    """

    members: tuple[Member, ...]
    """The members in the processes that answered, this one included, at most once each."""

    is_complete: bool
    """Whether all processes that this one knows have answered. Then each of their channels is in
    ``members`` whose ``group_add()`` had returned before the question, unless it has left since.

    It can't know of a process that hasn't come back yet, if it has connected itself after a restart
    of RabbitMQ; nor, for a moment, of others if it has connected while RabbitMQ couldn't deliver to
    any of them, or while all were busy for more than half a second."""

    silent: tuple[str, ...]
    """Ids of processes that are connected and didn't answer in time: they are busy or stuck."""

    absent: tuple[str, ...]
    """Ids of processes that have lost their connection a moment ago, and may be back soon. After
    ten seconds a process counts as gone, with its members."""
