"""Which groups RabbitMQ must be told to bind or to unbind, and when.

A group moves like this. In the middle state of each row a command is *due*; it leaves that state
when ``next_commands()`` returns the command, and the next one when RabbitMQ has answered it::

             require                next_commands          on_answer(ok)
    UNBOUND ---------> BIND_DUE -----------------> BINDING ------------> BOUND
       ^                  ^                                              |  ^
       |                  | on_answer,                         unrequire |  | require
       |                  | required again                               v  |
       +----------------- UNBINDING <------------- UNBIND_DUE <------- LINGERING
       on_answer                     next_commands       linger is over

- One command for a group is outstanding at a time. If members join or leave meanwhile, that takes
  effect when RabbitMQ has answered. So the last command for a group says what its members did last,
  however require, unrequire and answers interleave.
- *Linger*: a group stays bound for a moment after its last member has left, because the next member
  often joins at once (a page is reloaded), and a bind costs RabbitMQ 0.4 ms of CPU. Until the
  unbind is written, ``require()`` costs nothing.
- Binds go before unbinds, because callers wait for binds. Prioritized binds go before all others.
  But binds can't keep unbinds waiting for ever: each kind has its own limit of what is outstanding.
- A refused bind isn't repeated until a caller asks again. The reason (permissions, a missing
  exchange) rarely goes away, and RabbitMQ closes the AMQP channel for each refusal.
- A refused unbind counts as done. It would only be refused again, and the router drops what still
  arrives for the group.

No I/O: the caller writes what ``next_commands()`` returns and reports the answers. Every operation
but ``connection_lost()`` costs the same whatever the number of groups.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ..statistics import GroupStatistics


@dataclass(frozen=True)
class Command:
    """Bind (or else unbind) this process's queue for ``group``."""

    group: str
    bind: bool


class _State(enum.IntEnum):  # Enum would hash in Python, which half of the time went to.
    UNBOUND = enum.auto()  # and no command is due: its bind was refused
    BIND_DUE = enum.auto()
    PRIORITY_BIND_DUE = enum.auto()
    BINDING = enum.auto()
    BOUND = enum.auto()
    LINGERING = enum.auto()
    UNBIND_DUE = enum.auto()
    UNBINDING = enum.auto()


_BOUND = (_State.BOUND, _State.LINGERING, _State.UNBIND_DUE)
# The commands that are due, the most urgent first, and where a group is once its own is written
_DUE = (
    (_State.PRIORITY_BIND_DUE, _State.BINDING),
    (_State.BIND_DUE, _State.BINDING),
    (_State.UNBIND_DUE, _State.UNBINDING),
)


@dataclass(eq=False, slots=True)
class _Group:
    name: str
    state: _State = _State.UNBOUND
    is_required: bool = False  # It has members.
    is_prioritized: bool = False  # A caller waits for its bind.
    # Required since before the connection was lost, and neither bound nor refused since
    is_awaiting_rebind: bool = False
    command: Command | None = None  # the outstanding one
    lingers_until: float = 0.0


class Bindings:
    """The bindings of all groups of one queue.

    ``clock`` returns seconds. ``linger`` is how many of them a group stays bound without members;
    beyond ``max_lingering`` such groups, the one that has lingered longest is unbound at once.

    ``window`` is the most binds outstanding at a time, and the most unbinds. It is enough to keep
    RabbitMQ at work (it makes 2,500 to 6,000 bindings a second). But queued binds delay RabbitMQ's
    close of a connection: with 250, five times as many messages to its channels were lost as with
    50. Unbinds have a window of their own, because endless joins would keep them waiting for ever.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        linger: float = 2.0,
        max_lingering: int = 1000,
        window: int = 50,
    ) -> None:
        self._clock = clock
        self._linger = linger
        self._max_lingering = max_lingering
        self._window = window
        # All but those without members that are unbound; required ones in the order of joining.
        self._groups: dict[str, _Group] = {}
        # By state, in the order of entering it.
        # OrderedDict and not dict: taking the first of a dict again and again is quadratic.
        self._in: dict[_State, OrderedDict[_Group, None]] = {}
        self._clear_states()
        self.required = 0  # how many groups have members
        # How many of them wait to be bound again since the connection was lost
        self.awaiting_rebind = 0

    def require(self, name: str) -> None:
        """Have a group bound: it has members. A bind that was refused is due again."""
        group = self._groups.get(name)
        if group is None:
            group = _Group(name)
            self._in[group.state][group] = None
        if not group.is_required:
            group.is_required = True
            self.required += 1
            self._groups.pop(name, None)  # It goes to the end: it is the last to join.
            self._groups[name] = group
        if group.state in _BOUND:
            self._enter(group, _State.BOUND)
        elif group.state is _State.UNBOUND:
            self._add_bind(group)

    def unrequire(self, name: str) -> None:
        """Let a group go: its last member has left. No error if it has none."""
        group = self._groups.get(name)
        if group is None or not group.is_required:
            return
        group.is_required = group.is_prioritized = False
        self.required -= 1
        self._end_awaiting_rebind(group)
        if group.state is _State.BOUND:
            self._start_linger(group)
        elif group.command is None:
            self._enter(group, _State.UNBOUND)

    def is_required(self, name: str) -> bool:
        """Whether a group has members."""
        group = self._groups.get(name)
        return group is not None and group.is_required

    def is_bound(self, name: str) -> bool:
        """Whether a group's bind was confirmed on this connection, and no unbind written."""
        group = self._groups.get(name)
        return group is not None and group.state in _BOUND

    def prioritize(self, name: str) -> None:
        """Bind a group before the others, because a caller waits for it.

        Holds until it is bound, refused or unrequired, also on the next connection. Nothing happens
        if the group is bound or has no members. A bind that was refused is due again.
        """
        group = self._groups.get(name)
        if group is None or not group.is_required or group.state in _BOUND:
            return
        group.is_prioritized = True
        if group.state in (_State.UNBOUND, _State.BIND_DUE):
            self._add_bind(group)

    def next_commands(self) -> list[Command]:
        """Return what to write now, in this order; each is outstanding until ``on_answer``.

        There may be more after the next answer (the window), after a change, and at
        ``next_deadline()``.
        """
        self._end_lingers()
        commands = []
        for due, outstanding in _DUE:
            while self._in[due] and len(self._in[outstanding]) < self._window:
                group = next(iter(self._in[due]))
                group.command = Command(group.name, bind=outstanding is _State.BINDING)
                self._enter(group, outstanding)
                commands.append(group.command)
        return commands

    def on_answer(self, command: Command, ok: bool) -> None:
        """Note RabbitMQ's answer to ``command``, the very object that was returned.

        Nothing happens if it was written on a former connection.
        """
        group = self._groups.get(command.group)
        if group is None or group.command is not command:
            return
        group.command = None
        if not command.bind:
            self._enter(group, _State.UNBOUND)
            if group.is_required:
                self._add_bind(group)
            return
        group.is_prioritized = False
        self._end_awaiting_rebind(group)
        if not ok:
            self._enter(group, _State.UNBOUND)
        elif group.is_required:
            self._enter(group, _State.BOUND)
        else:
            self._start_linger(group)

    def connection_lost(self) -> None:
        """Start anew: nothing is bound or outstanding, and the binds of required groups are due."""
        self._clear_states()
        self._groups = {name: group for name, group in self._groups.items() if group.is_required}
        self.awaiting_rebind = len(self._groups)
        for group in self._groups.values():
            group.command = None
            group.is_awaiting_rebind = True
            group.state = _State.UNBOUND
            self._in[group.state][group] = None
            self._add_bind(group)

    def next_deadline(self) -> float | None:
        """Return when ``next_commands()`` has more to give by itself: the next linger ends."""
        group = next(iter(self._in[_State.LINGERING]), None)
        return None if group is None else group.lingers_until

    @property
    def outstanding(self) -> int:
        """How many commands wait for their answer."""
        return self._count(_State.BINDING, _State.UNBINDING)

    @property
    def bound(self) -> int:
        """How many groups are bound, lingering ones included."""
        return self._count(*_BOUND)

    @property
    def lingering(self) -> int:
        """How many groups stay bound for a moment without members."""
        return self._count(_State.LINGERING)

    def statistics(self) -> GroupStatistics:
        """Tell how many there are. From any thread."""
        return GroupStatistics(self.required, self.bound, self.lingering)

    def __repr__(self) -> str:
        due = self._count(*(due for due, _ in _DUE))
        return (
            f"<Bindings: required={self.required} bound={self.bound} lingering={self.lingering}"
            f" due={due} outstanding={self.outstanding}>"
        )

    def _clear_states(self) -> None:
        self._in = {state: OrderedDict() for state in _State}

    def _count(self, *states: _State) -> int:
        return sum(len(self._in[state]) for state in states)

    def _enter(self, group: _Group, state: _State) -> None:
        del self._in[group.state][group]
        group.state = state
        if state is _State.UNBOUND and not group.is_required:
            del self._groups[group.name]
        else:
            self._in[state][group] = None

    def _add_bind(self, group: _Group) -> None:
        due = _State.PRIORITY_BIND_DUE if group.is_prioritized else _State.BIND_DUE
        self._enter(group, due)

    def _end_awaiting_rebind(self, group: _Group) -> None:
        self.awaiting_rebind -= group.is_awaiting_rebind
        group.is_awaiting_rebind = False

    def _start_linger(self, group: _Group) -> None:
        # Each lingers for as long, so the first to enter is the first to end.
        group.lingers_until = self._clock() + self._linger
        self._enter(group, _State.LINGERING)
        if self.lingering > self._max_lingering:
            self._enter(next(iter(self._in[_State.LINGERING])), _State.UNBIND_DUE)

    def _end_lingers(self) -> None:
        now = self._clock()
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            self._enter(next(iter(self._in[_State.LINGERING])), _State.UNBIND_DUE)
