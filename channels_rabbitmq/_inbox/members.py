"""Which channels of this event loop are in which group.

A channel becomes a member *before* the broker has confirmed the group's binding, so that the
first message through the new binding already reaches it. Until then its membership rests on
*claims*: each running ``group_add()`` has one. A claim ends well (the binding is confirmed: the
channel is a member until it leaves) or badly (refused, timed out, cancelled), and a membership
that nothing confirmed and nobody claims any more is removed. So an add that fails leaves the
channel as it was, also when several adds of one channel run at the same moment.

Leaving removes the membership whatever its claims. An add that was running meanwhile finds its
membership *detached* from the table and settling it changes nothing: the last call wins.

No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Membership:
    """One channel in one group; made by :meth:`Members.join`, and only to be handed back."""

    __slots__ = ("channel", "claims", "confirmed", "group")

    def __init__(self, group: str, channel: str) -> None:
        self.group = group
        self.channel = channel
        # Adds that are still running
        self.claims = 0
        # Whether one add has ended well: from then on only leaving ends the membership.
        self.confirmed = False

    def __repr__(self) -> str:
        state = "confirmed" if self.confirmed else "pending"
        return f"<Membership: {self.channel} in {self.group}, {state}, claims={self.claims}>"


class Members:
    """The groups that have members here. A group without members leaves nothing behind."""

    def __init__(self) -> None:
        # Group -> channel -> membership; no inner dict is empty.
        self._groups: dict[str, dict[str, Membership]] = {}

    def join(self, group: str, channel: str) -> Membership:
        """Let ``channel`` hear ``group`` from now on, and claim its membership.

        Each call adds one claim, which the caller ends with :meth:`settle`, once.
        """
        channels = self._groups.setdefault(group, {})
        membership = channels.get(channel)
        if membership is None:
            membership = channels[channel] = Membership(group, channel)
        membership.claims += 1
        return membership

    def settle(self, membership: Membership, ok: bool) -> bool:
        """End one claim: confirm the membership, or take it back if nothing else supports it.

        Returns True if the group has just lost its last member.
        """
        assert membership.claims > 0, "each join is settled once"
        membership.claims -= 1
        if ok:
            membership.confirmed = True
            return False
        if membership.confirmed or membership.claims:
            return False
        if self._groups.get(membership.group, {}).get(membership.channel) is not membership:
            return False  # It left meanwhile (and may have joined anew: not our membership).
        return self._remove(membership.group, membership.channel)

    def leave(self, group: str, channel: str) -> bool:
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
