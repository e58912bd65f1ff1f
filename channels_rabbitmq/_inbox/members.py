"""Which channels of this event loop are in which group.

A channel becomes a member *before* the broker has confirmed the group's binding, so that the
first message through the new binding already reaches it. Until then its membership rests on its
*pending adds*: the ``group_add()`` calls that are running. An add ends well if the binding is
confirmed: then the channel is a member until it is discarded. It ends badly if the binding is
refused, not confirmed in time, or the call is cancelled. A membership without a confirmed and
without a pending add is removed. So an add that fails leaves the channel as it was, also when
several adds of one channel run at the same moment.

A discard removes the membership whatever adds are pending. Those that were running meanwhile find
their membership *detached* from the table, and finishing them changes nothing: the last call wins.

No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Membership:
    """One channel in one group; made by :meth:`Members.add`, and only to be handed back."""

    __slots__ = ("channel", "confirmed", "group", "pending_adds")

    def __init__(self, group: str, channel: str) -> None:
        self.group = group
        self.channel = channel
        self.pending_adds = 0
        # Whether one add has ended well: from then on only a discard ends the membership.
        self.confirmed = False

    def __repr__(self) -> str:
        state = "confirmed" if self.confirmed else "pending"
        return f"<Membership: {self.channel} in {self.group}, {state}, adds={self.pending_adds}>"


class Members:
    """The groups that have members here. A group without members leaves nothing behind."""

    def __init__(self) -> None:
        # Group -> channel -> membership; no inner dict is empty.
        self._groups: dict[str, dict[str, Membership]] = {}

    def add(self, group: str, channel: str) -> Membership:
        """Let ``channel`` hear ``group`` from now on.

        The add is pending until the caller ends it with :meth:`finish_add`, once.
        """
        channels = self._groups.setdefault(group, {})
        membership = channels.get(channel)
        if membership is None:
            membership = channels[channel] = Membership(group, channel)
        membership.pending_adds += 1
        return membership

    def finish_add(self, membership: Membership, ok: bool) -> bool:
        """End one add: confirm the membership, or remove it if no other add supports it.

        Returns True if the group has just lost its last member.
        """
        assert membership.pending_adds > 0, "each add is finished once"
        membership.pending_adds -= 1
        if ok:
            membership.confirmed = True
            return False
        if membership.confirmed or membership.pending_adds:
            return False
        if self._groups.get(membership.group, {}).get(membership.channel) is not membership:
            return False  # Discarded meanwhile, and perhaps added anew: another membership.
        return self._remove(membership.group, membership.channel)

    def discard(self, group: str, channel: str) -> bool:
        """Stop delivery of ``group`` to ``channel``; no error if it isn't a member.

        Returns True if the group has just lost its last member.
        """
        if channel not in self._groups.get(group, {}):
            return False
        return self._remove(group, channel)

    def channels(self, group: str) -> Collection[str]:
        """The members of ``group``, pending ones included: a live view, empty if there are none."""
        channels = self._groups.get(group)
        return () if channels is None else channels.keys()

    def has_members(self, group: str) -> bool:
        return group in self._groups

    def groups(self) -> Iterable[str]:
        """All groups with members; a live view."""
        return self._groups.keys()

    def groups_of(self, channel: str) -> list[str]:
        """The groups of one channel. Looks at all groups, so it isn't for what happens often."""
        return [group for group, channels in self._groups.items() if channel in channels]

    def __len__(self) -> int:
        """The number of groups with members."""
        return len(self._groups)

    def __repr__(self) -> str:
        memberships = sum(map(len, self._groups.values()))
        return f"<Members: {memberships} memberships in {len(self._groups)} groups>"

    def _remove(self, group: str, channel: str) -> bool:
        channels = self._groups[group]
        del channels[channel]
        if channels:
            return False
        del self._groups[group]
        return True
