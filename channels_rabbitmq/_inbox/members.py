"""Which channels of this event loop are in which group.

A channel becomes a member *before* the broker has confirmed the group's binding, so that the first
message through the new binding already reaches the channel. Until then its membership rests on
*pending adds*: the ``group_add()`` calls that are running. If the broker confirms the binding, the
channel is a member until it is discarded. If the broker refuses, or the call times out or is
cancelled, the add has failed. A membership that isn't confirmed and has no pending add is removed.
So an add that fails leaves the channel as it was, also when several adds of one channel run at the
same moment.

A discard removes the membership, however many adds are pending. An add that was running meanwhile
then holds a membership that is *detached* from the table, and finishing the add changes nothing. So
the last call wins.

A member's *info* is kept packed, and beside the table: so members without one cost nothing for it.

This module does no I/O and has no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Membership:
    """One channel in one group. Callers get it from :meth:`Members.add` and only hand it back."""

    __slots__ = ("channel", "confirmed", "group", "pending_adds")

    def __init__(self, group: str, channel: str) -> None:
        self.group = group
        self.channel = channel
        self.pending_adds = 0
        # Whether the broker has confirmed. From then on only a discard ends the membership.
        self.confirmed = False

    def __repr__(self) -> str:
        state = "confirmed" if self.confirmed else "pending"
        return f"<Membership: {self.channel} in {self.group}, {state}, adds={self.pending_adds}>"


class Members:
    """The groups that have members here. A group without members takes no memory."""

    def __init__(self) -> None:
        # Group -> channel -> membership; no inner dict is empty.
        self._groups: dict[str, dict[str, Membership]] = {}
        self._infos: dict[Membership, bytes] = {}  # of memberships in the table only

    def add(self, group: str, channel: str) -> Membership:
        """Deliver ``group`` to ``channel`` from now on.

        The add is pending until the caller ends it with :meth:`finish_add`, once.
        """
        channels = self._groups.setdefault(group, {})
        membership = channels.get(channel)
        if membership is None:
            membership = channels[channel] = Membership(group, channel)
        membership.pending_adds += 1
        return membership

    def finish_add(self, membership: Membership, ok: bool, info: bytes | None = None) -> bool:
        """End one add: confirm the membership if ``ok``, else remove it unless it is needed.

        If ``ok``, ``info`` takes the place of the member's former one (None: it has none).

        Returns True if the group has just lost its last member.
        """
        assert membership.pending_adds > 0, "each add is finished once"
        membership.pending_adds -= 1
        if ok:
            membership.confirmed = True
            if info is not None or self._infos:
                self._set_info(membership, info)
            return False
        if membership.confirmed or membership.pending_adds:
            return False
        if not self._is_in_table(membership):
            return False  # It was discarded. If it was added anew, that is another membership.
        return self._remove(membership.group, membership.channel)

    def discard(self, group: str, channel: str) -> bool:
        """Stop delivery of ``group`` to ``channel``; no error if it isn't a member.

        Returns True if the group has just lost its last member.
        """
        if channel not in self._groups.get(group, {}):
            return False
        return self._remove(group, channel)

    def _is_in_table(self, membership: Membership) -> bool:
        channels = self._groups.get(membership.group, {})
        return channels.get(membership.channel) is membership

    def _set_info(self, membership: Membership, info: bytes | None) -> None:
        if info is None:
            self._infos.pop(membership, None)
        elif self._is_in_table(membership):
            self._infos[membership] = info

    def confirmed(self, group: str) -> list[tuple[str, bytes | None]]:
        """Return the channels of a group whose adds have succeeded, each with its info."""
        memberships = self._groups.get(group, {}).values()
        return [(one.channel, self._infos.get(one)) for one in memberships if one.confirmed]

    def count(self, group: str) -> int:
        """Return the number of channels that ``confirmed`` returns."""
        return sum(one.confirmed for one in self._groups.get(group, {}).values())

    def clear(self) -> list[str]:
        """Take all channels out of all groups; return those that had members."""
        groups = list(self._groups)
        self._groups.clear()
        self._infos.clear()
        return groups

    def channels(self, group: str) -> Collection[str]:
        """Return a live view of the members of ``group``, the unconfirmed ones included."""
        channels = self._groups.get(group)
        return () if channels is None else channels.keys()

    def has_members(self, group: str) -> bool:
        return group in self._groups

    def groups(self) -> Iterable[str]:
        """Return a live view of all groups with members."""
        return self._groups.keys()

    def groups_of(self, channel: str) -> list[str]:
        """Return the groups of one channel. It looks at all groups, so don't call it often."""
        return [group for group, channels in self._groups.items() if channel in channels]

    def __repr__(self) -> str:
        memberships = sum(map(len, self._groups.values()))
        return f"<Members: {memberships} memberships in {len(self._groups)} groups>"

    def _remove(self, group: str, channel: str) -> bool:
        channels = self._groups[group]
        membership = channels.pop(channel)
        if self._infos:
            self._infos.pop(membership, None)
        if channels:
            return False
        del self._groups[group]
        return True
