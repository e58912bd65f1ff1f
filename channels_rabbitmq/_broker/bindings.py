"""Which groups the broker must be told to bind or to unbind, and when.

For each group three things are kept apart: whether members want it (``want``, ``release``), what
the broker was told and has not answered (``take``), what it confirmed (``settle``). From the
outside a group moves like this::

              want                take               settle ok
    unbound -------> bind due ----------> binding ---------------> bound
       ^                ^                                          |   ^
       |                | settle, wanted again             release |   | want
       |                |                                          v   |
       +------------ unbinding <---------- unbind due <--------- lingering
       settle                     take               linger over

- One command for a group is outstanding at a time; what members decide meanwhile takes effect
  when the answer comes. So however want, release and answers interleave, the broker's last
  command for a group says what members said last.
- *Linger*: a group stays bound for a moment after its last member has left, because the next
  one is often there at once (a page is reloaded) and a bind costs the broker 0.4 ms of CPU.
  ``want()`` costs nothing as long as the unbind is not written.
- Binds go before unbinds (somebody waits for a bind), and hurried binds before all others. But no
  number of binds keeps unbinds waiting: each kind has its own limit of what is outstanding.
- A refused bind is not tried again by itself: the reason (permissions, a missing exchange) rarely
  goes away, and the broker closes the AMQP channel for each refusal.
- A refused unbind counts as done: trying again can only be refused again, and what still
  arrives for the group is dropped by the router as unwanted.

No I/O: the caller writes what ``take()`` returns and reports the answers. Every operation costs
the same whatever the number of groups, but for ``connection_lost()``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """Bind (or else unbind) this process's queue for ``group``."""

    group: str
    bind: bool


class Bindings:
    """The bindings of all groups of one queue.

    ``clock`` returns seconds; ``linger`` is how many of them a group stays bound without members;
    beyond ``max_lingering`` such groups, the one that has lingered longest is unbound at once;
    ``window`` is the most binds outstanding at a time, and the most unbinds: enough to keep the
    broker at work (it makes 2,500 to 6,000 bindings a second), and not so many that those it has
    yet to make hold up the end of a connection which it closes. (With 250, five times the messages
    to its channels were lost then as with 50.) Unbinds have a window of their own because joins
    without end would keep them waiting without end.
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

        # Groups with members, in the order in which they came (they are bound again in it).
        self._wanted: dict[str, None] = {}
        # Wanted groups not yet bound for whose bind somebody waits
        self._hurried: set[str] = set()
        # Confirmed by the broker on this connection, and no unbind written
        self._bound: set[str] = set()
        # Wanted since before the connection was lost, and not bound, nor refused, since
        self._missing: set[str] = set()
        # Written and not answered, and how many of them are binds
        self._outstanding: dict[str, Command] = {}
        self._binding = 0

        # A wanted group that is neither bound nor outstanding is in one of the first two, unless
        # its bind was refused; a bound group that nobody wants is in one of the last two.
        # OrderedDict and not dict: taking the first of a dict again and again is quadratic.
        self._hurried_binds: OrderedDict[str, None] = OrderedDict()
        self._binds: OrderedDict[str, None] = OrderedDict()
        self._lingering: OrderedDict[str, float] = OrderedDict()  # until when
        self._unbinds: OrderedDict[str, None] = OrderedDict()

    def want(self, group: str) -> None:
        """Have ``group`` bound: it has members.

        Calling it again changes nothing, but for a bind that was refused: it is due again.
        """
        self._wanted[group] = None
        if group in self._bound:
            self._lingering.pop(group, None)
            self._unbinds.pop(group, None)
        elif group not in self._outstanding:
            self._add_bind(group)

    def release(self, group: str) -> None:
        """Let go of ``group``: its last member has left. No error if nobody wanted it."""
        if group not in self._wanted:
            return
        del self._wanted[group]
        self._missing.discard(group)
        self._hurried.discard(group)
        if group in self._bound:
            self._start_linger(group)
        else:
            self._hurried_binds.pop(group, None)
            self._binds.pop(group, None)

    def is_wanted(self, group: str) -> bool:
        """Whether ``group`` has members."""
        return group in self._wanted

    def is_bound(self, group: str) -> bool:
        """Whether ``group`` is bound: confirmed on this connection, and no unbind written."""
        return group in self._bound

    def hurry(self, group: str) -> None:
        """Bind ``group`` before those that are not hurried, because somebody waits for it.

        Holds until it is bound, refused or released, beyond a lost connection. Nothing happens if
        the group is bound or nobody wants it. A bind that was refused is due again.
        """
        if group not in self._wanted or group in self._bound:
            return
        self._hurried.add(group)
        if group not in self._outstanding:
            self._binds.pop(group, None)
            self._hurried_binds[group] = None

    def take(self) -> list[Command]:
        """What to write now, in this order; each command is outstanding until it is settled.

        There may be more after the next :meth:`settle` (the window), after a change, and at
        :meth:`next_deadline`.
        """
        self._end_lingers()
        unbinding = len(self._outstanding) - self._binding
        commands = self._take_from(self._hurried_binds, True, self._window - self._binding)
        commands += self._take_from(self._binds, True, self._window - self._binding)
        commands += self._take_from(self._unbinds, False, self._window - unbinding)
        return commands

    def settle(self, command: Command, ok: bool) -> None:
        """Note the broker's answer to ``command``, the very object that :meth:`take` returned.

        An answer that belongs to a former connection changes nothing.
        """
        group = command.group
        if self._outstanding.get(group) is not command:
            return
        del self._outstanding[group]
        self._binding -= command.bind
        wanted = group in self._wanted
        if not command.bind:
            if wanted:
                self._add_bind(group)
            return
        self._missing.discard(group)
        if ok:
            self._bound.add(group)
            self._hurried.discard(group)
            if not wanted:
                self._start_linger(group)
        else:
            self._hurried.discard(group)  # It is due again when somebody asks.

    def connection_lost(self) -> None:
        """Start anew: nothing is bound or outstanding; what is wanted is due again."""
        self._bound.clear()
        self._outstanding.clear()
        self._binding = 0
        self._lingering.clear()
        self._unbinds.clear()
        self._hurried_binds.clear()
        self._binds.clear()
        self._missing = set(self._wanted)
        for group in self._wanted:
            self._add_bind(group)

    def next_deadline(self) -> float | None:
        """The moment at which :meth:`take` has more to give by itself: the next linger ends."""
        return next(iter(self._lingering.values()), None)

    @property
    def outstanding(self) -> int:
        """How many commands wait for their answer."""
        return len(self._outstanding)

    @property
    def wanted(self) -> int:
        """How many groups have members."""
        return len(self._wanted)

    @property
    def bound(self) -> int:
        """How many groups are bound, lingering ones included."""
        return len(self._bound)

    @property
    def lingering(self) -> int:
        """How many groups stay bound for a moment without members."""
        return len(self._lingering)

    @property
    def missing(self) -> int:
        """How many groups wait to be bound again since the connection was lost."""
        return len(self._missing)

    def __repr__(self) -> str:
        due = len(self._hurried_binds) + len(self._binds) + len(self._unbinds)
        return (
            f"<Bindings: wanted={self.wanted} bound={self.bound} lingering={self.lingering}"
            f" due={due} outstanding={len(self._outstanding)}>"
        )

    def _add_bind(self, group: str) -> None:
        if group in self._hurried:
            self._hurried_binds[group] = None
        else:
            self._binds[group] = None

    def _start_linger(self, group: str) -> None:
        # A group that starts now ends last, so the order of insertion is that of the deadlines.
        self._lingering[group] = self._clock() + self._linger
        if len(self._lingering) > self._max_lingering:
            oldest, _ = self._lingering.popitem(last=False)
            self._unbinds[oldest] = None

    def _end_lingers(self) -> None:
        if not self._lingering:
            return
        now = self._clock()
        while self._lingering and next(iter(self._lingering.values())) <= now:
            group, _ = self._lingering.popitem(last=False)
            self._unbinds[group] = None

    def _take_from(self, due: OrderedDict[str, None], bind: bool, room: int) -> list[Command]:
        commands: list[Command] = []
        while due and len(commands) < room:
            group, _ = due.popitem(last=False)
            self._bound.discard(group)  # An unbind that is written counts as done.
            command = Command(group, bind)
            self._outstanding[group] = command
            self._binding += bind
            commands.append(command)
        return commands
