"""Which binds and unbinds are due, in what order, and that the broker ends as members want."""

from __future__ import annotations

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
        bindings.want(group)
    settle_all(bindings)


def settle_all(bindings: Bindings) -> list[Command]:
    """Let the broker agree to everything; returns what was written."""
    written = []
    while commands := bindings.take():
        for command in commands:
            bindings.settle(command, True)
        written += commands
    return written


# Binding


def test_wanted_group_is_bound_once() -> None:
    bindings, _ = make()
    bindings.want("g")
    bindings.want("g")
    (command,) = bindings.take()
    assert command == bind("g")
    bindings.want("g")
    assert bindings.take() == []
    assert not bindings.is_bound("g")
    bindings.settle(command, True)
    assert bindings.is_bound("g")
    bindings.want("g")
    assert bindings.take() == []


def test_group_released_before_its_bind_was_written_costs_nothing() -> None:
    bindings, _ = make()
    bindings.want("g")
    bindings.want("h")
    bindings.hurry("h")
    bindings.release("g")
    bindings.release("h")
    assert bindings.take() == []
    assert bindings.next_deadline() is None


def test_releasing_what_nobody_wants_is_no_error() -> None:
    bindings, clock = make()
    bindings.release("g")
    assert bindings.take() == []
    make_bound(bindings, "h")
    bindings.release("h")
    clock.now += 1
    bindings.release("h")
    assert bindings.next_deadline() == clock.now + 1  # Not from the second release on.


def test_no_more_than_the_window_is_outstanding() -> None:
    bindings, _ = make(window=2)
    for group in "abcde":
        bindings.want(group)
    first = bindings.take()
    assert first == [bind("a"), bind("b")]
    assert bindings.take() == []
    bindings.settle(first[1], True)
    assert bindings.take() == [bind("c")]


def test_joins_without_end_do_not_keep_unbinds_waiting() -> None:
    """Else the groups that everybody has left would stay bound for as long as others are joined."""
    bindings, _ = make(window=2, max_lingering=0)
    make_bound(bindings, "x", "y", "z")
    for group in "abc":
        bindings.want(group)
    for group in "xyz":
        bindings.release(group)
    first = bindings.take()
    assert first == [bind("a"), bind("b"), unbind("x"), unbind("y")]
    assert bindings.take() == []
    bindings.settle(first[2], True)
    assert bindings.take() == [unbind("z")]
    bindings.settle(first[0], True)
    assert bindings.take() == [bind("c")]
    bindings.connection_lost()
    assert bindings.take() == [bind("a"), bind("b")]


# Linger and unbinding


def test_group_lingers_before_it_is_unbound() -> None:
    bindings, clock = make(linger=2.0)
    make_bound(bindings, "g")
    bindings.release("g")
    assert bindings.take() == []
    assert bindings.is_bound("g")
    assert bindings.lingering == 1
    assert bindings.next_deadline() == clock.now + 2
    clock.now += 2
    assert bindings.take() == [unbind("g")]
    assert not bindings.is_bound("g")
    assert bindings.lingering == 0
    assert bindings.next_deadline() is None


def test_coming_back_while_lingering_costs_nothing() -> None:
    bindings, clock = make(linger=2.0)
    make_bound(bindings, "g")
    bindings.release("g")
    clock.now += 1
    bindings.want("g")
    assert bindings.is_bound("g")
    clock.now += 100
    assert bindings.take() == []
    assert bindings.next_deadline() is None


def test_coming_back_when_the_unbind_is_due_but_not_written_costs_nothing() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "g")
    bindings.release("g")
    bindings.want("g")
    assert bindings.take() == []
    assert bindings.is_bound("g")


def test_each_linger_starts_anew() -> None:
    bindings, clock = make(linger=2.0)
    make_bound(bindings, "a", "b")
    bindings.release("a")
    clock.now += 1
    bindings.release("b")
    bindings.want("a")
    clock.now += 0.5
    bindings.release("a")
    assert bindings.next_deadline() == clock.now + 1.5
    clock.now += 1.5
    assert bindings.take() == [unbind("b")]
    assert bindings.next_deadline() == clock.now + 0.5


def test_too_many_lingering_groups_end_the_oldest_linger() -> None:
    bindings, _ = make(max_lingering=2)
    make_bound(bindings, "a", "b", "c")
    for group in "bac":
        bindings.release(group)
    assert bindings.lingering == 2
    assert bindings.take() == [unbind("b")]


def test_want_during_an_unbind_binds_right_after() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "g")
    bindings.release("g")
    (command,) = bindings.take()
    bindings.want("g")
    assert bindings.take() == []  # One command for a group at a time
    assert not bindings.is_bound("g")
    bindings.settle(command, True)
    assert bindings.take() == [bind("g")]


def test_release_during_a_bind_lingers_when_it_is_bound() -> None:
    bindings, clock = make(linger=2.0)
    bindings.want("g")
    (command,) = bindings.take()
    bindings.release("g")
    assert bindings.next_deadline() is None
    clock.now += 5
    bindings.settle(command, True)
    assert bindings.lingering == 1
    assert bindings.next_deadline() == clock.now + 2


def test_leave_and_join_at_the_same_moment_end_bound() -> None:
    """Fault 8 of channels_rabbitmq 4.0.1: 19 of 400 groups stayed deaf."""
    bindings, clock = make(linger=0.0)
    make_bound(bindings, "g")
    for _ in range(3):
        bindings.release("g")
        clock.now += 1
        (command,) = bindings.take()
        bindings.want("g")
        bindings.release("g")
        bindings.want("g")
        bindings.settle(command, True)
        assert settle_all(bindings) == [bind("g")]
        assert bindings.is_bound("g")


# Order


def test_binds_go_before_unbinds_and_hurried_ones_first() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "old")
    bindings.release("old")
    for group in "abcd":
        bindings.want(group)
    bindings.hurry("d")
    bindings.hurry("c")
    assert bindings.take() == [bind("d"), bind("c"), bind("a"), bind("b"), unbind("old")]


def test_hurrying_what_is_bound_or_unwanted_changes_nothing() -> None:
    bindings, _ = make()
    make_bound(bindings, "g")
    bindings.hurry("g")
    bindings.hurry("unknown")
    assert bindings.take() == []
    assert bindings.wanted == 1


def test_hurry_during_an_unbind_hurries_the_bind_after_it() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "g")
    bindings.release("g")
    (command,) = bindings.take()
    bindings.want("a")
    bindings.want("g")
    bindings.hurry("g")
    bindings.settle(command, True)
    assert bindings.take() == [bind("g"), bind("a")]


def test_released_group_is_hurried_no_more() -> None:
    bindings, _ = make()
    bindings.want("a")
    bindings.want("b")
    bindings.hurry("b")
    bindings.release("b")
    bindings.want("b")
    assert bindings.take() == [bind("a"), bind("b")]


# Refusals


def test_refused_bind_waits_until_it_is_wanted_again() -> None:
    bindings, _ = make()
    bindings.want("g")
    (command,) = bindings.take()
    bindings.settle(command, False)
    assert not bindings.is_bound("g")
    assert bindings.take() == []
    bindings.want("g")
    assert bindings.take() == [bind("g")]


def test_refused_bind_is_due_again_when_hurried() -> None:
    bindings, _ = make()
    bindings.want("a")
    bindings.want("g")
    command = bindings.take()[1]
    bindings.settle(command, False)
    bindings.want("b")
    bindings.hurry("g")
    assert bindings.take() == [bind("g"), bind("b")]


def test_refused_bind_is_due_again_on_the_next_connection() -> None:
    bindings, _ = make()
    bindings.want("g")
    bindings.settle(bindings.take()[0], False)
    bindings.connection_lost()
    assert bindings.take() == [bind("g")]


def test_refused_bind_does_not_stop_the_rest() -> None:
    bindings, _ = make(window=1)
    for group in "abc":
        bindings.want(group)
    for ok in (True, False, True):
        (command,) = bindings.take()
        bindings.settle(command, ok)
    assert [bindings.is_bound(group) for group in "abc"] == [True, False, True]


def test_bind_refused_when_nobody_wants_it_any_more_leaves_nothing() -> None:
    bindings, _ = make()
    bindings.want("g")
    (command,) = bindings.take()
    bindings.release("g")
    bindings.settle(command, False)
    assert bindings.take() == []
    assert repr(bindings) == repr(make()[0])


def test_refused_unbind_is_not_tried_again() -> None:
    bindings, _ = make(max_lingering=0)
    make_bound(bindings, "g")
    bindings.release("g")
    (command,) = bindings.take()
    bindings.settle(command, False)
    assert bindings.take() == []
    bindings.want("g")
    assert bindings.take() == [bind("g")]


# Connections


def test_lost_connection_makes_what_is_wanted_due_again() -> None:
    bindings, clock = make(max_lingering=1)
    make_bound(bindings, "bound", "lingering", "unbind due")
    bindings.release("unbind due")
    bindings.release("lingering")
    bindings.want("binding")
    bindings.hurry("binding")
    assert bindings.take() == [bind("binding"), unbind("unbind due")]
    bindings.want("due")
    bindings.connection_lost()
    assert not bindings.is_bound("bound")
    assert (bindings.wanted, bindings.bound, bindings.lingering) == (3, 0, 0)
    assert bindings.next_deadline() is None
    clock.now += 100
    assert bindings.take() == [bind("binding"), bind("bound"), bind("due")]


def test_what_is_missing_since_the_connection_was_lost() -> None:
    bindings, _ = make()
    make_bound(bindings, "a", "b", "lingering")
    bindings.release("lingering")
    bindings.want("refused")
    bindings.settle(bindings.take()[0], False)
    assert bindings.missing == 0
    bindings.connection_lost()
    assert bindings.missing == 3
    bindings.want("new")  # Whoever adds it waits for it.
    assert bindings.missing == 3
    commands = {command.group: command for command in bindings.take()}
    bindings.settle(commands["new"], True)
    assert bindings.missing == 3
    bindings.settle(commands["a"], True)
    bindings.settle(commands["refused"], False)
    assert bindings.missing == 1
    # On a second loss all that is wanted counts again.
    bindings.connection_lost()
    assert bindings.missing == 4
    bindings.release("a")
    bindings.want("a")
    assert bindings.missing == 3
    for command in bindings.take():
        bindings.settle(command, True)
    assert bindings.missing == 0


def test_answer_of_a_former_connection_changes_nothing() -> None:
    bindings, _ = make()
    bindings.want("g")
    (old,) = bindings.take()
    bindings.connection_lost()
    bindings.settle(old, True)
    assert not bindings.is_bound("g")
    (new,) = bindings.take()
    assert new == old  # The same command, but another object
    bindings.settle(old, True)
    assert not bindings.is_bound("g")
    bindings.settle(new, True)
    assert bindings.is_bound("g")


def test_hurry_outlives_the_connection() -> None:
    """Who waits for a bind goes on waiting when the connection is lost."""
    bindings, _ = make()
    bindings.want("a")
    bindings.want("g")
    bindings.hurry("g")
    bindings.take()
    bindings.connection_lost()
    assert bindings.take() == [bind("g"), bind("a")]


def test_hurry_ends_with_the_answer() -> None:
    bindings, _ = make()
    bindings.want("new")
    for group in ("bound", "refused"):
        bindings.want(group)
        bindings.hurry(group)
    for command in bindings.take():
        bindings.settle(command, command.group != "refused")
    bindings.connection_lost()
    assert bindings.take() == [bind("new"), bind("bound"), bind("refused")]


def test_hurried_binds_are_due_again_in_the_order_of_joining() -> None:
    bindings, _ = make(window=1)
    for group in "abc":
        bindings.want(group)
    for group in "cba":
        bindings.hurry(group)
    assert bindings.take() == [bind("c")]
    bindings.connection_lost()
    assert bindings.take() == [bind("a")]


def test_repr_tells_the_state() -> None:
    bindings, _ = make(window=3)
    make_bound(bindings, "bound", "leaving")
    bindings.release("leaving")
    for group in "abcd":
        bindings.want(group)
    bindings.take()
    assert repr(bindings) == "<Bindings: wanted=5 bound=2 lingering=1 due=1 outstanding=3>"


def test_hundred_thousand_groups() -> None:
    """Anything quadratic would run into the time limit of the test."""
    bindings, clock = make()
    groups = [f"group-{n}" for n in range(100_000)]
    for group in groups:
        bindings.want(group)
    assert len(settle_all(bindings)) == 100_000
    bindings.connection_lost()
    for group in reversed(groups):
        bindings.hurry(group)
    assert len(settle_all(bindings)) == 100_000
    for group in groups:
        bindings.release(group)
    clock.now += 10
    assert len(settle_all(bindings)) == 100_000
    assert (bindings.wanted, bindings.bound) == (0, 0)


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
        # What members and senders asked for
        self.wanted: set[str] = set()
        self.hurried: set[str] = set()
        self.refused: set[str] = set()
        # The broker: written and not answered, in order; its bindings; unbinds it refused
        self.written: list[Command] = []
        self.bound: set[str] = set()
        self.stuck: set[str] = set()
        # Commands of former connections whose answer may still be reported
        self.stale: list[Command] = []

    @rule(group=GROUPS)
    def want(self, group: str) -> None:
        self.wanted.add(group)
        self.refused.discard(group)
        self.bindings.want(group)

    @rule(group=GROUPS)
    def release(self, group: str) -> None:
        self.wanted.discard(group)
        self.hurried.discard(group)
        self.refused.discard(group)
        self.bindings.release(group)

    @rule(group=GROUPS)
    def hurry(self, group: str) -> None:
        if group in self.wanted and not self.bindings.is_bound(group):
            self.hurried.add(group)
            self.refused.discard(group)
        self.bindings.hurry(group)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def take(self) -> None:
        commands = self.bindings.take()
        ranks = [
            0 if command.group in self.hurried else 1 if command.bind else 2 for command in commands
        ]
        assert ranks == sorted(ranks)
        for command in commands:
            assert command.bind is (command.group in self.wanted), "nothing needless is written"
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
            elif group in self.wanted:
                self.refused.add(group)
            self.hurried.discard(group)
        elif ok:
            self.bound.discard(group)
        else:
            self.stuck.add(group)
        self.bindings.settle(command, ok)

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
        self.bindings.settle(self.stale.pop(), ok)
        assert repr(self.bindings) == before

    @rule()
    def everything_settles(self) -> None:
        """The broker has then bound what is wanted, and what lingers, and nothing else."""
        for _ in range(20):
            while self.written:
                self.answer(ok=True)
            self.take()
            if not self.written:
                break
        assert not self.written, "it comes to rest"
        wanted = self.wanted - self.refused
        assert {group for group in "abcde" if self.bindings.is_bound(group)} <= self.bound
        assert wanted <= self.bound
        spare = self.bound - wanted - self.stuck
        assert len(spare) == self.bindings.lingering
        assert all(self.bindings.is_bound(group) for group in spare)

    @rule()
    def everything_settles_and_lingers_end(self) -> None:
        self.everything_settles()  # A bind that nobody wants any more lingers from its answer on.
        self.clock.now += self.LINGER
        self.everything_settles()
        assert self.bindings.lingering == 0
        assert self.bound - self.stuck == self.wanted - self.refused

    @invariant()
    def bounds_are_kept(self) -> None:
        for bind in (True, False):
            assert sum(command.bind is bind for command in self.written) <= self.WINDOW
        groups = [command.group for command in self.written]
        assert len(groups) == len(set(groups)), "one command for a group at a time"
        assert self.bindings.lingering <= self.MAX_LINGERING
        assert self.bindings.wanted == len(self.wanted)

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
        self.everything_settles_and_lingers_end()


TestBindingsMachine = BindingsMachine.TestCase
TestBindingsMachine.settings = settings(stateful_step_count=50)
