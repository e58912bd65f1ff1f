"""Which binds and unbinds are due, in what order, and that the broker ends as members want."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from channels_rabbitmq._broker.bindings import Bindings, Command


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(
    *, linger: float = 2.0, max_lingering: int = 1000, window: int = 50
) -> tuple[Bindings, Clock]:
    clock = Clock()
    bindings = Bindings(clock=clock, linger=linger, max_lingering=max_lingering, window=window)
    return bindings, clock


def bind(group: str) -> Command:
    return Command(group, True)


def unbind(group: str) -> Command:
    return Command(group, False)


def make_bound(bindings: Bindings, *groups: str) -> None:
    for group in groups:
        bindings.require(group)
    answer_all(bindings)


def answer_all(bindings: Bindings) -> list[Command]:
    """Let the broker agree to everything; returns what was written."""
    written = []
    while commands := bindings.next_commands():
        for command in commands:
            bindings.on_answer(command, True)
        written += commands
    return written


# Binding


def test_required_group_is_bound_once() -> None:
    bindings, _ = make()
    bindings.require("g")
    bindings.require("g")
    (command,) = bindings.next_commands()
    assert command == bind("g")
    bindings.require("g")
    assert bindings.next_commands() == []
    assert not bindings.is_bound("g")
    bindings.on_answer(command, True)
    assert bindings.is_bound("g")
    bindings.require("g")
    assert bindings.next_commands() == []


def test_group_unrequired_before_its_bind_was_written_costs_nothing() -> None:
    bindings, _ = make()
    bindings.require("g")
    bindings.require("h")
    bindings.prioritize("h")
    bindings.unrequire("g")
    bindings.unrequire("h")
    assert bindings.next_commands() == []
    assert bindings.next_deadline() is None


def test_unrequiring_what_has_no_members_is_no_error() -> None:
    bindings, clock = make()
    bindings.unrequire("g")
    assert bindings.next_commands() == []
    make_bound(bindings, "h")
    bindings.unrequire("h")
    clock.now += 1
    bindings.unrequire("h")
    assert bindings.next_deadline() == clock.now + 1  # Not from the second call on.


def test_no_more_than_the_window_is_outstanding() -> None:
    bindings, _ = make(window=2)
    for group in "abcde":
        bindings.require(group)
    first = bindings.next_commands()
    assert first == [bind("a"), bind("b")]
    assert bindings.next_commands() == []
    bindings.on_answer(first[1], True)
    assert bindings.next_commands() == [bind("c")]


def test_joins_without_end_do_not_keep_unbinds_waiting() -> None:
    """Else the groups that everybody has left would stay bound for as long as others are joined."""
    bindings, _ = make(window=2, max_lingering=0)
    make_bound(bindings, "x", "y", "z")
    for group in "abc":
        bindings.require(group)
    for group in "xyz":
        bindings.unrequire(group)
    first = bindings.next_commands()
    assert first == [bind("a"), bind("b"), unbind("x"), unbind("y")]
    assert bindings.next_commands() == []
    bindings.on_answer(first[2], True)
    assert bindings.next_commands() == [unbind("z")]
    bindings.on_answer(first[0], True)
    assert bindings.next_commands() == [bind("c")]
    bindings.connection_lost()
    assert bindings.next_commands() == [bind("a"), bind("b")]


# Linger and unbinding


def test_group_lingers_before_it_is_unbound() -> None:
    bindings, clock = make(linger=2.0)
    make_bound(bindings, "g")
    bindings.unrequire("g")
    assert bindings.next_commands() == []
    assert bindings.is_bound("g")
    assert bindings.lingering == 1
    assert bindings.next_deadline() == clock.now + 2
    clock.now += 2
    assert bindings.next_commands() == [unbind("g")]
    assert not bindings.is_bound("g")
    assert bindings.lingering == 0
    assert bindings.next_deadline() is None


def test_coming_back_while_lingering_costs_nothing() -> None:
    bindings, clock = make(linger=2.0)
    make_bound(bindings, "g")
    bindings.unrequire("g")
    clock.now += 1
    bindings.require("g")
    assert bindings.is_bound("g")
    clock.now += 100
    assert bindings.next_commands() == []
    assert bindings.next_deadline() is None


def test_coming_back_when_the_unbind_is_due_but_not_written_costs_nothing() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "g")
    bindings.unrequire("g")
    bindings.require("g")
    assert bindings.next_commands() == []
    assert bindings.is_bound("g")


def test_each_linger_starts_anew() -> None:
    bindings, clock = make(linger=2.0)
    make_bound(bindings, "a", "b")
    bindings.unrequire("a")
    clock.now += 1
    bindings.unrequire("b")
    bindings.require("a")
    clock.now += 0.5
    bindings.unrequire("a")
    assert bindings.next_deadline() == clock.now + 1.5
    clock.now += 1.5
    assert bindings.next_commands() == [unbind("b")]
    assert bindings.next_deadline() == clock.now + 0.5


def test_too_many_lingering_groups_end_the_oldest_linger() -> None:
    bindings, _ = make(max_lingering=2)
    make_bound(bindings, "a", "b", "c")
    for group in "bac":
        bindings.unrequire(group)
    assert bindings.lingering == 2
    assert bindings.next_commands() == [unbind("b")]


def test_require_during_an_unbind_binds_right_after() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "g")
    bindings.unrequire("g")
    (command,) = bindings.next_commands()
    bindings.require("g")
    assert bindings.next_commands() == []  # One command for a group at a time
    assert not bindings.is_bound("g")
    bindings.on_answer(command, True)
    assert bindings.next_commands() == [bind("g")]


def test_unrequire_during_a_bind_lingers_when_it_is_bound() -> None:
    bindings, clock = make(linger=2.0)
    bindings.require("g")
    (command,) = bindings.next_commands()
    bindings.unrequire("g")
    assert bindings.next_deadline() is None
    clock.now += 5
    bindings.on_answer(command, True)
    assert bindings.lingering == 1
    assert bindings.next_deadline() == clock.now + 2


def test_leave_and_join_at_the_same_moment_end_bound() -> None:
    """Fault 8 of channels_rabbitmq 4.0.1: 19 of 400 groups stayed deaf."""
    bindings, clock = make(linger=0.0)
    make_bound(bindings, "g")
    for _ in range(3):
        bindings.unrequire("g")
        clock.now += 1
        (command,) = bindings.next_commands()
        bindings.require("g")
        bindings.unrequire("g")
        bindings.require("g")
        bindings.on_answer(command, True)
        assert answer_all(bindings) == [bind("g")]
        assert bindings.is_bound("g")


# Order


def test_binds_go_before_unbinds_and_prioritized_ones_first() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "old")
    bindings.unrequire("old")
    for group in "abcd":
        bindings.require(group)
    bindings.prioritize("d")
    bindings.prioritize("c")
    assert bindings.next_commands() == [bind("d"), bind("c"), bind("a"), bind("b"), unbind("old")]


def test_prioritizing_what_is_bound_or_has_no_members_changes_nothing() -> None:
    bindings, _ = make()
    make_bound(bindings, "g")
    bindings.prioritize("g")
    bindings.prioritize("unknown")
    assert bindings.next_commands() == []
    assert bindings.required == 1


def test_prioritize_during_an_unbind_prioritizes_the_bind_after_it() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "g")
    bindings.unrequire("g")
    (command,) = bindings.next_commands()
    bindings.require("a")
    bindings.require("g")
    bindings.prioritize("g")
    bindings.on_answer(command, True)
    assert bindings.next_commands() == [bind("g"), bind("a")]


def test_unrequired_group_is_prioritized_no_more() -> None:
    bindings, _ = make()
    bindings.require("a")
    bindings.require("b")
    bindings.prioritize("b")
    bindings.unrequire("b")
    bindings.require("b")
    assert bindings.next_commands() == [bind("a"), bind("b")]


# Refusals


def test_refused_bind_waits_until_it_is_required_again() -> None:
    bindings, _ = make()
    bindings.require("g")
    (command,) = bindings.next_commands()
    bindings.on_answer(command, False)
    assert not bindings.is_bound("g")
    assert bindings.next_commands() == []
    bindings.require("g")
    assert bindings.next_commands() == [bind("g")]


def test_refused_bind_is_due_again_when_prioritized() -> None:
    bindings, _ = make()
    bindings.require("a")
    bindings.require("g")
    command = bindings.next_commands()[1]
    bindings.on_answer(command, False)
    bindings.require("b")
    bindings.prioritize("g")
    assert bindings.next_commands() == [bind("g"), bind("b")]


def test_refused_bind_is_due_again_on_the_next_connection() -> None:
    bindings, _ = make()
    bindings.require("g")
    bindings.on_answer(bindings.next_commands()[0], False)
    bindings.connection_lost()
    assert bindings.next_commands() == [bind("g")]


def test_refused_bind_does_not_stop_the_rest() -> None:
    bindings, _ = make(window=1)
    for group in "abc":
        bindings.require(group)
    for ok in (True, False, True):
        (command,) = bindings.next_commands()
        bindings.on_answer(command, ok)
    assert [bindings.is_bound(group) for group in "abc"] == [True, False, True]


def test_bind_refused_when_it_has_no_members_any_more_leaves_nothing() -> None:
    bindings, _ = make()
    bindings.require("g")
    (command,) = bindings.next_commands()
    bindings.unrequire("g")
    bindings.on_answer(command, False)
    assert bindings.next_commands() == []
    assert repr(bindings) == repr(make()[0])


def test_refused_unbind_is_not_tried_again() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "g")
    bindings.unrequire("g")
    (command,) = bindings.next_commands()
    bindings.on_answer(command, False)
    assert bindings.next_commands() == []
    bindings.require("g")
    assert bindings.next_commands() == [bind("g")]


# Connections


def test_lost_connection_makes_what_is_required_due_again() -> None:
    bindings, clock = make(max_lingering=1)
    make_bound(bindings, "bound", "lingering", "unbind due")
    bindings.unrequire("unbind due")
    bindings.unrequire("lingering")
    bindings.require("binding")
    bindings.prioritize("binding")
    assert bindings.next_commands() == [bind("binding"), unbind("unbind due")]
    bindings.require("due")
    bindings.connection_lost()
    assert not bindings.is_bound("bound")
    assert (bindings.required, bindings.bound, bindings.lingering) == (3, 0, 0)
    assert bindings.next_deadline() is None
    clock.now += 100
    assert bindings.next_commands() == [bind("binding"), bind("bound"), bind("due")]


def test_what_awaits_its_rebind_since_the_connection_was_lost() -> None:
    bindings, _ = make()
    make_bound(bindings, "a", "b", "lingering")
    bindings.unrequire("lingering")
    bindings.require("refused")
    bindings.on_answer(bindings.next_commands()[0], False)
    assert bindings.awaiting_rebind == 0
    bindings.connection_lost()
    assert bindings.awaiting_rebind == 3
    bindings.require("new")  # The caller that adds it waits for it.
    assert bindings.awaiting_rebind == 3
    commands = {command.group: command for command in bindings.next_commands()}
    bindings.on_answer(commands["new"], True)
    assert bindings.awaiting_rebind == 3
    bindings.on_answer(commands["a"], True)
    bindings.on_answer(commands["refused"], False)
    assert bindings.awaiting_rebind == 1
    # On a second loss all that have members count again.
    bindings.connection_lost()
    assert bindings.awaiting_rebind == 4
    bindings.unrequire("a")
    bindings.require("a")
    assert bindings.awaiting_rebind == 3
    for command in bindings.next_commands():
        bindings.on_answer(command, True)
    assert bindings.awaiting_rebind == 0


def test_answer_of_a_former_connection_changes_nothing() -> None:
    bindings, _ = make()
    bindings.require("g")
    (old,) = bindings.next_commands()
    bindings.connection_lost()
    bindings.on_answer(old, True)
    assert not bindings.is_bound("g")
    (new,) = bindings.next_commands()
    assert new == old  # The same command, but another object
    bindings.on_answer(old, True)
    assert not bindings.is_bound("g")
    bindings.on_answer(new, True)
    assert bindings.is_bound("g")


def test_priority_outlives_the_connection() -> None:
    """A caller that waits for a bind goes on waiting when the connection is lost."""
    bindings, _ = make()
    bindings.require("a")
    bindings.require("g")
    bindings.prioritize("g")
    bindings.next_commands()
    bindings.connection_lost()
    assert bindings.next_commands() == [bind("g"), bind("a")]


def test_priority_ends_with_the_answer() -> None:
    bindings, _ = make()
    bindings.require("new")
    for group in ("bound", "refused"):
        bindings.require(group)
        bindings.prioritize(group)
    for command in bindings.next_commands():
        bindings.on_answer(command, command.group != "refused")
    bindings.connection_lost()
    assert bindings.next_commands() == [bind("new"), bind("bound"), bind("refused")]


def test_prioritized_binds_are_due_again_in_the_order_of_joining() -> None:
    bindings, _ = make(window=1)
    for group in "abc":
        bindings.require(group)
    for group in "cba":
        bindings.prioritize(group)
    assert bindings.next_commands() == [bind("c")]
    bindings.connection_lost()
    assert bindings.next_commands() == [bind("a")]


def test_repr_tells_the_state() -> None:
    bindings, _ = make(window=3)
    make_bound(bindings, "bound", "leaving")
    bindings.unrequire("leaving")
    for group in "abcd":
        bindings.require(group)
    bindings.next_commands()
    assert repr(bindings) == "<Bindings: required=5 bound=2 lingering=1 due=1 outstanding=3>"


def test_hundred_thousand_groups() -> None:
    """Anything quadratic would run into the time limit of the test."""
    bindings, clock = make()
    groups = [f"group-{n}" for n in range(100_000)]
    for group in groups:
        bindings.require(group)
    assert len(answer_all(bindings)) == 100_000
    bindings.connection_lost()
    for group in reversed(groups):
        bindings.prioritize(group)
    assert len(answer_all(bindings)) == 100_000
    for group in groups:
        bindings.unrequire(group)
    clock.now += 10
    assert len(answer_all(bindings)) == 100_000
    assert (bindings.required, bindings.bound) == (0, 0)


# Any interleaving

GROUPS = st.sampled_from("abcde")


class BindingsMachine(RuleBasedStateMachine):
    """Members, time, a broker that answers in order and sometimes refuses, lost connections."""

    LINGER = 2.0
    MAX_LINGERING = 2
    WINDOW = 3

    def __init__(self) -> None:
        super().__init__()
        self.bindings, self.clock = make(
            linger=self.LINGER, max_lingering=self.MAX_LINGERING, window=self.WINDOW
        )
        # What members and callers asked for
        self.required: set[str] = set()
        self.prioritized: set[str] = set()
        self.refused: set[str] = set()
        # The broker: written and not answered, in order; its bindings; unbinds it refused
        self.written: list[Command] = []
        self.bound: set[str] = set()
        self.stuck: set[str] = set()
        # Commands of former connections whose answer may still be reported
        self.stale: list[Command] = []

    @rule(group=GROUPS)
    def require(self, group: str) -> None:
        self.required.add(group)
        self.refused.discard(group)
        self.bindings.require(group)

    @rule(group=GROUPS)
    def unrequire(self, group: str) -> None:
        self.required.discard(group)
        self.prioritized.discard(group)
        self.refused.discard(group)
        self.bindings.unrequire(group)

    @rule(group=GROUPS)
    def prioritize(self, group: str) -> None:
        if group in self.required and not self.bindings.is_bound(group):
            self.prioritized.add(group)
            self.refused.discard(group)
        self.bindings.prioritize(group)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def next_commands(self) -> None:
        commands = self.bindings.next_commands()
        ranks = [
            0 if command.group in self.prioritized else 1 if command.bind else 2
            for command in commands
        ]
        assert ranks == sorted(ranks)
        for command in commands:
            assert command.bind is (command.group in self.required), "nothing needless is written"
            assert command.group not in self.refused
        self.written += commands

    @precondition(lambda self: self.written)
    @rule(ok=st.sampled_from([True, True, True, False]))
    def answer(self, ok: bool) -> None:
        command = self.written.pop(0)
        group = command.group
        if command.bind:
            if ok:
                self.bound.add(group)
                self.stuck.discard(group)
            elif group in self.required:
                self.refused.add(group)
            self.prioritized.discard(group)
        elif ok:
            self.bound.discard(group)
        else:
            self.stuck.add(group)
        self.bindings.on_answer(command, ok)

    @rule()
    def lose_connection(self) -> None:
        self.stale += self.written
        self.written.clear()
        self.bound.clear()
        self.stuck.clear()
        self.refused.clear()
        self.bindings.connection_lost()
        assert (self.bindings.bound, self.bindings.lingering) == (0, 0)

    @precondition(lambda self: self.stale)
    @rule(ok=st.booleans())
    def late_answer(self, ok: bool) -> None:
        before = repr(self.bindings)
        self.bindings.on_answer(self.stale.pop(), ok)
        assert repr(self.bindings) == before

    @rule()
    def everything_is_answered(self) -> None:
        """The broker has then bound what has members, and what lingers, and nothing else."""
        for _ in range(20):
            while self.written:
                self.answer(ok=True)
            self.next_commands()
            if not self.written:
                break
        assert not self.written, "it comes to rest"
        required = self.required - self.refused
        assert {group for group in "abcde" if self.bindings.is_bound(group)} <= self.bound
        assert required <= self.bound
        spare = self.bound - required - self.stuck
        assert len(spare) == self.bindings.lingering
        assert all(self.bindings.is_bound(group) for group in spare)

    @rule()
    def everything_is_answered_and_lingers_end(self) -> None:
        # A group that was bound for nobody lingers from the answer on.
        self.everything_is_answered()
        self.clock.now += self.LINGER
        self.everything_is_answered()
        assert self.bindings.lingering == 0
        assert self.bound - self.stuck == self.required - self.refused

    @invariant()
    def bounds_are_kept(self) -> None:
        for bind in (True, False):
            assert sum(command.bind is bind for command in self.written) <= self.WINDOW
        groups = [command.group for command in self.written]
        assert len(groups) == len(set(groups)), "one command for a group at a time"
        assert self.bindings.lingering <= self.MAX_LINGERING
        assert self.bindings.required == len(self.required)

    @invariant()
    def is_bound_is_true_only_if_the_broker_will_deliver(self) -> None:
        unbinding = {command.group for command in self.written if not command.bind}
        for group in "abcde":
            if self.bindings.is_bound(group):
                assert group in self.bound - unbinding

    @invariant()
    def deadline_is_that_of_a_linger(self) -> None:
        deadline = self.bindings.next_deadline()
        assert (deadline is None) is (self.bindings.lingering == 0)
        assert deadline is None or deadline <= self.clock.now + self.LINGER

    def teardown(self) -> None:
        self.everything_is_answered_and_lingers_end()


TestBindingsMachine = BindingsMachine.TestCase
TestBindingsMachine.settings = settings(stateful_step_count=50)
# Beside other suites it has taken more than a minute.
TestBindingsMachine.pytestmark = pytest.mark.timeout(300)
