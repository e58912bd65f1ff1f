"""Who is in which group while adds run, fail, are cancelled, and meet discards."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from channels_rabbitmq._inbox.members import Members, Membership


@pytest.fixture
def members() -> Members:
    return Members()


def test_channel_hears_group_while_its_add_is_pending(members: Members) -> None:
    """The first message after the bind must find the member, whichever task runs first."""
    members.add("g", "a")
    assert list(members.channels("g")) == ["a"]
    assert members.has_members("g")


def test_failed_add_leaves_no_member(members: Members) -> None:
    membership = members.add("g", "a")
    assert members.finish_add(membership, False) is True
    assert list(members.channels("g")) == []
    assert not members.has_members("g")


def test_failed_add_beside_other_members_does_not_empty_the_group(members: Members) -> None:
    members.finish_add(members.add("g", "a"), True)
    assert members.finish_add(members.add("g", "b"), False) is False
    assert list(members.channels("g")) == ["a"]


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_one_of_two_concurrent_adds_cancelled(members: Members, cancelled_first: bool) -> None:
    """The one that succeeds counts, in whatever order they end."""
    one, two = members.add("g", "a"), members.add("g", "a")
    assert members.finish_add(one, not cancelled_first) is False
    assert members.finish_add(two, cancelled_first) is False
    assert list(members.channels("g")) == ["a"]


def test_both_of_two_concurrent_adds_cancelled(members: Members) -> None:
    one, two = members.add("g", "a"), members.add("g", "a")
    assert members.finish_add(one, False) is False
    assert members.has_members("g")
    assert members.finish_add(two, False) is True
    assert not members.has_members("g")


def test_cancelled_second_add_of_a_member_leaves_it_a_member(members: Members) -> None:
    members.finish_add(members.add("g", "a"), True)
    assert members.finish_add(members.add("g", "a"), False) is False
    assert list(members.channels("g")) == ["a"]


@pytest.mark.parametrize("ok", [True, False])
def test_discard_during_add_wins(members: Members, ok: bool) -> None:
    membership = members.add("g", "a")
    assert members.discard("g", "a") is True
    assert members.finish_add(membership, ok) is False
    assert not members.has_members("g")


def test_add_after_discard_wins(members: Members) -> None:
    members.finish_add(members.add("g", "a"), True)
    members.discard("g", "a")
    members.finish_add(members.add("g", "a"), True)
    assert list(members.channels("g")) == ["a"]


@pytest.mark.parametrize("ok", [True, False])
def test_add_discarded_meanwhile_does_not_touch_the_next_one(members: Members, ok: bool) -> None:
    """add, discard, add: the end of the first add says nothing about the second."""
    first = members.add("g", "a")
    members.discard("g", "a")
    second = members.add("g", "a")
    members.finish_add(first, ok)
    assert list(members.channels("g")) == ["a"]
    assert members.finish_add(second, False) is True
    assert not members.has_members("g")


def test_leave_says_when_the_group_is_empty(members: Members) -> None:
    for channel in "ab":
        members.finish_add(members.add("g", channel), True)
    assert members.discard("g", "a") is False
    assert members.discard("g", "a") is False  # It is no member any more: no error.
    assert members.discard("g", "b") is True
    assert members.discard("g", "b") is False
    assert members.discard("never heard of", "b") is False


def test_counts_and_lists_groups(members: Members) -> None:
    members.add("g", "a")
    members.add("g", "b")
    members.add("h", "a")
    assert list(members.groups()) == ["g", "h"]
    assert repr(members) == "<Members: 3 memberships in 2 groups>"
    members.discard("h", "a")
    assert list(members.groups()) == ["g"]


def test_membership_repr_tells_its_state(members: Members) -> None:
    membership = members.add("g", "a")
    assert repr(membership) == "<Membership: a in g, pending, adds=1>"
    members.finish_add(membership, True)
    assert repr(membership) == "<Membership: a in g, confirmed, adds=0>"


class MembersMachine(RuleBasedStateMachine):
    """Any interleaving of adds, their ends, and discards, against the plain definition:
    a channel is a member if, since it last left, an add ended well or one is running."""

    pending_adds: Bundle[Any] = Bundle("pending_adds")

    def __init__(self) -> None:
        super().__init__()
        self.members = Members()
        self.confirmed: set[tuple[str, str]] = set()
        self.running: dict[int, tuple[str, str]] = {}
        self.next_number = 0

    def expected(self) -> set[tuple[str, str]]:
        return self.confirmed | set(self.running.values())

    def has_members(self, group: str) -> bool:
        return any(member_of == group for member_of, _ in self.expected())

    @rule(target=pending_adds, group=st.sampled_from("gh"), channel=st.sampled_from("abc"))
    def join(self, group: str, channel: str) -> tuple[int, Membership]:
        self.next_number += 1
        self.running[self.next_number] = (group, channel)
        return self.next_number, self.members.add(group, channel)

    @rule(pending_add=consumes(pending_adds), ok=st.booleans())
    def finish_add(self, pending_add: tuple[int, Membership], ok: bool) -> None:
        number, membership = pending_add
        had_members = self.has_members(membership.group)
        member = self.running.pop(number, None)
        if ok and member is not None:
            self.confirmed.add(member)
        emptied = had_members and not self.has_members(membership.group)
        assert self.members.finish_add(membership, ok) is emptied

    @rule(group=st.sampled_from("gh"), channel=st.sampled_from("abc"))
    def leave(self, group: str, channel: str) -> None:
        had_members = self.has_members(group)
        self.confirmed.discard((group, channel))
        self.running = {n: m for n, m in self.running.items() if m != (group, channel)}
        emptied = had_members and not self.has_members(group)
        assert self.members.discard(group, channel) is emptied

    @invariant()
    def members_are_as_defined(self) -> None:
        actual = {
            (g, channel) for g in self.members.groups() for channel in self.members.channels(g)
        }
        assert actual == self.expected()
        assert set(self.members.groups()) == {group for group, _ in actual}
        for group in "gh":
            assert self.members.has_members(group) is self.has_members(group)


TestMembersMachine = MembersMachine.TestCase
TestMembersMachine.settings = settings(stateful_step_count=30)
# Beside other suites it has taken more than a minute.
TestMembersMachine.pytestmark = pytest.mark.timeout(300)


class TestInfos:
    def test_a_member_has_the_info_of_its_last_add(self, members: Members) -> None:
        for info in (None, b"1", b"2", None):
            members.finish_add(members.add("g", "a"), True, info)
            assert members.confirmed("g") == [("a", info)]

    def test_only_confirmed_members_are_told(self, members: Members) -> None:
        members.add("g", "a")
        members.finish_add(members.add("g", "b"), True)
        assert members.confirmed("g") == [("b", None)]
        assert members.count("g") == 1
        assert members.confirmed("another") == []
        assert members.count("another") == 0

    def test_a_failed_add_leaves_the_info_as_it_was(self, members: Members) -> None:
        members.finish_add(members.add("g", "a"), True, b"1")
        members.finish_add(members.add("g", "a"), False, b"2")
        assert members.confirmed("g") == [("a", b"1")]

    def test_a_discard_takes_the_info_along(self, members: Members) -> None:
        members.finish_add(members.add("g", "a"), True, b"1")
        members.discard("g", "a")
        members.finish_add(members.add("g", "a"), True)
        assert members.confirmed("g") == [("a", None)]

    def test_nothing_stays_of_an_add_that_met_a_discard(self, members: Members) -> None:
        membership = members.add("g", "a")
        members.discard("g", "a")
        members.finish_add(membership, True, b"1")
        assert members.confirmed("g") == []
        assert members._infos == {}

    def test_members_without_info_take_no_memory_for_it(self, members: Members) -> None:
        for number in range(100):
            members.finish_add(members.add("g", f"c{number}"), True)
        assert members._infos == {}
        assert Membership.__slots__ == ("channel", "confirmed", "group", "pending_adds")
