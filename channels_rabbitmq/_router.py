"""Bring deliveries to the channels of this event loop, and say when the broker may forget them.

Rules without I/O: clock and acks are passed in, and nothing here awaits but
``wait()``, at one place. (The channel layer's own ``receive()`` awaits by itself and takes the same
steps, ``line_up``, ``collect`` and ``give_up``: that saves it a coroutine. Between the end of its
``await`` and ``collect`` there must be no other.)

**Receiving.** A waiting ``receive()`` is a future in the mailbox of its channel. Resolving it is
only a wake-up; it carries no message. The message is taken by the coroutine that was woken, with
no ``await`` between taking and returning, so a ``receive()`` that is cancelled on its way (Channels
does that at each disconnect) has taken nothing, and passes its wake-up on. As many messages as
receivers were woken are set aside for them: a new ``receive()`` takes one only if there are more.

**Accounting.** A delivery *counts* against ``local_capacity`` from its arrival until the last
mailbox that counts it has handed it out or dropped it; then it is acked, and the broker, whose
prefetch limit is ``local_capacity``, sends another. ``in_use`` is the number of those that count.
So if consumers are slow, the backlog grows on the broker and senders come to know.

**Stalled channels.** But one consumer that is stuck must not hold up all others. A channel is
stalled if it holds a message older than its patience (a second at first), nobody called
``receive()`` for it in that time and nobody waits for it, at least half of ``local_capacity`` is
in use, and another channel's ``receive()`` is waiting. What it holds stops counting, and what
arrives for it doesn't count until it calls ``receive()`` again. What doesn't count is acked early
and is bounded in another way: ``capacity`` messages for a channel, and ``UNCOUNTED_BYTES`` of
bodies in all; beyond either, the oldest are dropped. What is held when the connection is lost
stops counting in the same way, since its acks have nowhere to go.

**Lending.** A receiver on another event loop can't take a message in the moment of its wake-up:
until it hears of it, it may be cancelled. To it a message is *lent*. The message leaves its mailbox
and goes on counting; the receiver then takes it, which acks it, or it is given back, to where it
was: before all that arrived after it. That is a matter of milliseconds, unless the receiver's loop
is blocked or stopped, perhaps for ever. So a loan older than a second stops counting (acked early,
as above), and it ends when its message expires. What is lent without counting has no bound here: it
is at most one message for each pending ``receive()``, and how many of these there are is up to
those who call. A receiver that runs after all when its loan has ended still returns the message: it
was handed over, and nobody else gets it. It counts as expired then, not as received.

**Time.** Nothing waits longer than ``local_expiry``, but for a loan, which always has its second.
``receive()`` checks that itself; ``tick()`` sees to the channels that nobody reads and to loans,
and looks for stalled channels. It looks at the mailboxes which hold messages, not at idle ones.

A channel that holds nothing and for which nobody waits leaves nothing behind (but for an empty
mailbox of the one that was read last); gone with its mailbox are its patience and the fact that it
was stalled.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from channels.exceptions import StopConsumer

from ._mailbox import PATIENCE, Acker, Delivery, Loan, Mailbox

if TYPE_CHECKING:
    from ._codec import Envelope
    from ._members import Members
    from ._statistics import Counters

# Bodies held without counting against local_capacity, in bytes; a group's body counts once.
UNCOUNTED_BYTES = 64 * 1024 * 1024

# Seconds between two looks at what is held: how late a stalled channel is noticed at most.
TICK_INTERVAL = 0.25


class Router:
    """The mailboxes of one event loop; to be used on its thread only.

    - ``local_capacity``: the consumer's prefetch count;
    - ``local_expiry``: seconds a message may wait here;
    - ``capacity_of(channel)``: messages kept for a stalled channel;
    - ``report(reason, channel)`` is called for each message dropped: ``"expired"`` or
      ``"overflowed"``;
    - ``clock()``: seconds, never going back;
    - ``create_future()``: the event loop's.

    None of these callables, nor any ``ack()``, may raise or call the router.

    Of the counters, ``routed``, ``received``, ``unwanted``, ``expired`` and ``overflowed`` are kept
    here.
    """

    def __init__(
        self,
        *,
        members: Members,
        local_capacity: int,
        local_expiry: float,
        capacity_of: Callable[[str], int],
        counters: Counters,
        report: Callable[[str, str], None],
        clock: Callable[[], float],
        create_future: Callable[[], asyncio.Future[None]],
    ) -> None:
        self._members = members
        self._local_capacity = local_capacity
        self._local_expiry = local_expiry
        self._capacity_of = capacity_of
        self._counters = counters
        self._report = report
        self._clock = clock
        self._create_future = create_future

        self._closed = False
        self._closed_exc: type[BaseException] = StopConsumer  # for receivers, then
        # By channel; none is idle, but perhaps the one that was the last to hand out a message.
        self._mailboxes: dict[str, Mailbox] = {}
        self._just_idle: Mailbox | None = None
        # Those that hold messages (a dict for its order)
        self._holding: dict[Mailbox, None] = {}
        # Lent, and neither taken, given back nor expired; the oldest loan first
        self._loans: dict[Loan, None] = {}
        # How many receive() calls wait and were not woken
        self._waiting = 0
        # Deliveries so far; numbers them
        self._deliveries = 0
        # Deliveries that count against local_capacity
        self._in_use = 0
        # Bytes of bodies that some mailbox holds without counting them
        self._uncounted_bytes = 0
        # How many mailboxes are stalled
        self._stalled_channels = 0
        # Heap that finds the oldest uncounted message: (number of its first message, channel,
        # mailbox) for each mailbox with uncounted ones. A number may be too low, a mailbox may
        # have none any more or be there twice; _oldest_uncounted() and tick() put that right.
        self._uncounted_by_age: list[tuple[int, str, Mailbox]] = []
        # When tick() wants to be called, if anything is held or lent
        self._next_tick_at = 0.0

    # From the broker

    def deliver(self, envelope: Envelope, tag: int, acker: Acker) -> None:
        """Put a delivery into the mailbox of its channel, or of each member of its group.

        To be called for each delivery, in the broker's order. ``acker.ack(tag)`` is called once,
        perhaps before this returns (nobody wants it), or never if the connection is lost or the
        router closed before. The caller makes sure that a direct message is for a channel of this
        event loop. Afterwards :meth:`next_tick_at` may have changed from None to a moment.
        """
        if self._closed:
            return
        self._deliveries += 1
        now = self._clock()
        delivery = Delivery(envelope, tag, acker, now, self._deliveries)
        if not self._holding:
            self._next_tick_at = now + TICK_INTERVAL
        if envelope.group is not None:
            channels = self._members.channels(envelope.group)
            if not channels:
                self._counters.unwanted += 1
            self._counters.routed += len(channels)
            mailbox_of, simple = self._mailboxes.get, 0
            for channel in channels:
                mailbox = mailbox_of(channel)
                # What _put() does where more is waiting, without the call: the path of a burst.
                if (
                    mailbox is not None
                    and (backlog := mailbox.backlog) is not None
                    and mailbox.waiter is None
                ):
                    backlog.append(delivery)
                    simple += 1
                else:
                    self._put(channel, delivery)
            delivery.counting += simple
        else:
            assert envelope.channel is not None, "an envelope has one recipient"
            self._counters.routed += 1
            self._put(envelope.channel, delivery)
        if delivery.counting:
            self._in_use += 1
        else:  # It has no member, or stalled ones only.
            delivery.acker = None
            acker.ack(tag)

    def connection_lost(self) -> None:
        """Forget the acks of what is held; the messages stay, and stop counting.

        To be called once a connection is gone and before the next one delivers. Nothing that came
        before is acked after this.
        """
        held = list(self._holding)
        for mailbox in held:
            for delivery in mailbox.messages or ():
                delivery.acker = None
        for mailbox in held:
            self._stop_counting(mailbox)
        for loan in self._loans:
            loan.delivery.acker = None
            self._stop_counting_loan(loan)
        assert self._in_use == 0
        for mailbox in held:
            self._drop_overflow(mailbox)

    # For consumers

    def receive_nowait(self, channel: str) -> dict[str, Any] | None:
        """Return the next message of ``channel`` as ``receive`` does; None if there is none now.

        Also None for any channel that isn't one of this event loop.
        """
        mailbox = self._mailboxes.get(channel)
        if mailbox is None:
            return None
        backlog = mailbox.backlog
        if backlog is not None and len(backlog) > 1 and not mailbox.woken:
            # What the rest does, without the calls: the path of a burst.
            now = self._clock()
            delivery = backlog[0]
            if delivery.arrived + self._local_expiry > now:
                mailbox.active_at = now
                backlog.popleft()
                counting = delivery.counting - 1
                if counting:
                    delivery.counting = counting
                else:
                    self._uncount(delivery)
                self._counters.received += 1
                envelope = delivery.envelope
                return envelope.message() if envelope.flat is None else envelope.flat.copy()
        elif mailbox.messages is None:
            return None  # What comes will find a reader who waits, or be younger than he.
        now = self._clock()
        self._note_reader(mailbox, now)
        self._drop_expired(mailbox, now)
        if len(mailbox.messages or ()) <= mailbox.woken:
            return None
        return self._hand_out(mailbox)

    def knows(self, channel: str) -> bool:
        """Whether anything waits for or in a channel: so its name was found good before."""
        return channel in self._mailboxes

    async def receive(self, channel: str) -> dict[str, Any]:
        """Wait for the next message of ``channel``: the receiver's own copy.

        Either returns a message or changes nothing, whenever it is cancelled. Messages of a
        channel come in the order of their arrival; of several calls that wait on one channel,
        each gets another message. Raises ``StopConsumer`` once the router is closed.
        """
        message = self.receive_nowait(channel)
        if message is None:
            message = await self.wait(channel, self._hand_out)
        return message

    async def wait(self, channel: str, hand_out: Callable[[Mailbox], Any]) -> Any:
        """What ``receive`` does when ``receive_nowait`` has just given None."""
        mailbox, waiter = self.open_and_line_up(channel)
        while True:
            try:
                await waiter
            except BaseException:
                self.give_up(mailbox, waiter)
                raise
            message = self.collect(mailbox, hand_out)
            if message is not None:
                return message
            waiter = self.line_up_again(mailbox)

    # What wait() does, for a caller who saves its coroutine.

    def line_up(self, channel: str) -> tuple[Mailbox, asyncio.Future[None]] | None:
        """Wait for a message: its mailbox, and the future that will be its wake-up.

        None if nothing waits for or in the channel, so that nobody knows yet whether its name is
        good: :meth:`open_and_line_up` is for those. Only right after :meth:`receive_nowait` gave
        None, with no ``await`` between. Whoever awaits the future then calls either
        :meth:`collect`, or :meth:`give_up` if that raised; and after a None of the former
        :meth:`line_up_again`.
        """
        mailbox = self._mailboxes.get(channel)
        if mailbox is None:
            return None
        waiter = self._create_future()
        if mailbox.waiter is None:
            mailbox.waiter = waiter
        else:
            mailbox.add_waiter(waiter)
        self._waiting += 1
        return mailbox, waiter

    def open_and_line_up(self, channel: str) -> tuple[Mailbox, asyncio.Future[None]]:
        """As :meth:`line_up`, for any channel of this event loop.

        Raises ``StopConsumer`` if the router is closed.
        """
        if self._closed:
            raise self._closed_exc
        if channel not in self._mailboxes:
            self._mailboxes[channel] = Mailbox(channel, self._clock())
        lined_up = self.line_up(channel)
        assert lined_up is not None, "its mailbox is there"
        return lined_up

    def line_up_again(self, mailbox: Mailbox) -> asyncio.Future[None]:
        """As :meth:`line_up`, when :meth:`collect` found nothing: as the first in line."""
        waiter = self._create_future()
        mailbox.add_waiter_first(waiter)
        self._waiting += 1
        return waiter

    def collect(self, mailbox: Mailbox, hand_out: Callable[[Mailbox], Any] | None = None) -> Any:
        """Return the message for which a receiver was woken; None if it was dropped meanwhile.

        Raises ``StopConsumer`` if it was woken because the router was closed.
        """
        if self._closed:
            raise self._closed_exc
        mailbox.woken -= 1
        mailbox.active_at = now = self._clock()
        messages = mailbox.messages
        if messages is None or messages[0].arrived + self._local_expiry <= now:
            self._drop_expired(mailbox, now)
            if mailbox.messages is None:
                return None
        return self._hand_out(mailbox) if hand_out is None else hand_out(mailbox)

    def give_up(self, mailbox: Mailbox, waiter: asyncio.Future[None]) -> None:
        """Clean up after a receiver that won't come back, whether it was woken or not."""
        if self._closed:
            return
        if waiter.done() and not waiter.cancelled():
            mailbox.woken -= 1
            self._wake(mailbox)
        else:
            self._waiting -= 1
            if not mailbox.remove_waiter(waiter):
                return
        self._forget_if_idle(mailbox)

    async def lend(self, channel: str) -> Loan:
        """As :meth:`receive`, for a receiver on another event loop.

        Each loan ends by :meth:`take` or :meth:`give_back`, or by itself when its message expires,
        though not in its first second. Both do nothing for one that has ended, or once the router
        is closed; a receiver may return the message of a loan that ended by itself.
        """
        mailbox = self._mailboxes.get(channel)
        if mailbox is not None:
            now = self._clock()
            self._note_reader(mailbox, now)
            self._drop_expired(mailbox, now)
            if len(mailbox.messages or ()) > mailbox.woken:
                return self._lend(mailbox)
        loan: Loan = await self.wait(channel, self._lend)
        return loan

    def take(self, loan: Loan) -> None:
        """The receiver has the message."""
        if loan in self._loans:
            del self._loans[loan]
            self._counters.received += 1
            if loan.counts:
                self._uncount(loan.delivery)

    def give_back(self, loan: Loan) -> None:
        """The receiver won't have the message: put it back where it was."""
        if loan not in self._loans:
            return
        del self._loans[loan]
        delivery = loan.delivery
        mailbox = self._mailboxes.get(loan.channel)
        if mailbox is None:
            mailbox = self._mailboxes[loan.channel] = Mailbox(loan.channel, self._clock())
        messages = mailbox.messages
        if messages is None:
            self._holding[mailbox] = None
        if not isinstance(messages, deque):
            messages = mailbox.messages = deque(messages or ())
        # Of those that were lent at the same time, older ones may be back already.
        place = 0
        while place < len(messages) and messages[place].number < delivery.number:
            place += 1
        if place < mailbox.uncounted or mailbox.stalled:
            self._stop_counting_loan(loan)
        if not loan.counts:
            # The oldest don't count: that holds for all before it too.
            for older in list(islice(messages, mailbox.uncounted, place)):
                self._add_uncounted(mailbox, older)
                self._uncount(older)
            if not place and mailbox.uncounted:
                # The heap knows it by a message that isn't its first any more.
                heapq.heappush(self._uncounted_by_age, (delivery.number, mailbox.channel, mailbox))
            self._add_uncounted(mailbox, delivery)
        messages.insert(place, delivery)
        if not loan.counts:
            self._drop_overflow(mailbox)
        self._wake(mailbox)

    def cancel_receivers(self) -> None:
        """Cancel every ``receive()``, before ``close``: its event loop will never run again."""
        self._closed_exc = asyncio.CancelledError
        for mailbox in list(self._mailboxes.values()):
            while (waiter := mailbox.pop_waiter()) is not None:
                waiter.cancel()

    def close(self) -> None:
        """End every pending and later ``receive()`` with ``StopConsumer``; forget all messages.

        Acks nothing: the queue goes with its connection. Calling it again changes nothing.
        """
        self._closed = True
        mailboxes = list(self._mailboxes.values())
        self._mailboxes.clear()
        self._just_idle = None
        self._holding.clear()
        self._loans.clear()
        self._uncounted_by_age.clear()
        self._in_use = self._uncounted_bytes = self._waiting = self._stalled_channels = 0
        for mailbox in mailboxes:
            while (waiter := mailbox.pop_waiter()) is not None:
                # No set_exception(): a receive() cancelled at this moment would never fetch it,
                # and asyncio would log that.
                _wake_up(waiter)

    # Time

    def next_tick_at(self) -> float | None:
        """The moment at which :meth:`tick` wants to be called; None if nothing is held or lent.

        Only :meth:`deliver` changes it from None to a moment: what is lent was held before. So the
        caller asks after it while it has no timer running, starts one then, and goes on with what
        :meth:`tick` returns until that is None. A tick that comes late does no harm but that.
        """
        return self._next_tick_at if self._holding or self._loans else None

    def tick(self) -> float | None:
        """Drop what has expired, see to loans, look for stalled channels.

        Returns :meth:`next_tick_at`.
        """
        now = self._clock()
        for mailbox in [mailbox for mailbox in self._holding if self._has_expired(mailbox, now)]:
            self._drop_expired(mailbox, now)
            self._forget_if_idle(mailbox)
        if self._loans:
            self._see_to_loans(now)
        self._find_stalled(now)
        if self._uncounted_by_age:
            self._list_uncounted()
        self._next_tick_at = now + TICK_INTERVAL
        return self.next_tick_at()

    # For operators: what counts may be read on any thread, and costs the same whatever is held

    @property
    def in_use(self) -> int:
        """Unacked deliveries that count against ``local_capacity``."""
        return self._in_use

    @property
    def waiting_messages(self) -> int:
        """Messages held in all channels; a group's message counts for each member."""
        if self._closed:
            return 0
        counters = self._counters
        gone = counters.received + counters.expired + counters.overflowed + len(self._loans)
        return max(0, counters.routed - gone)

    @property
    def lent_messages(self) -> int:
        return len(self._loans)

    @property
    def channels(self) -> int:
        """How many channels hold messages or have a ``receive()`` waiting."""
        idle = self._just_idle
        is_there = idle is not None and idle.is_idle and self._mailboxes.get(idle.channel) is idle
        return len(self._mailboxes) - is_there

    @property
    def receivers(self) -> int:
        """How many ``receive()`` calls wait and were not woken."""
        return self._waiting

    @property
    def stalled_channels(self) -> int:
        return self._stalled_channels

    @property
    def uncounted_bytes(self) -> int:
        """Size of the bodies that are held without counting against ``local_capacity``."""
        return self._uncounted_bytes

    def fullest_channels(self, count: int = 5) -> list[tuple[str, int]]:
        """The channels that hold the most messages, and how many."""
        held = ((len(mailbox.messages or ()), mailbox.channel) for mailbox in self._holding)
        return [(channel, n) for n, channel in heapq.nlargest(count, held)]

    @property
    def idle(self) -> bool:
        """Whether no message is held or lent and no ``receive()`` is waiting."""
        return not self._loans and all(mailbox.is_idle for mailbox in self._mailboxes.values())

    def __repr__(self) -> str:
        if self._closed:
            return "<Router: closed>"
        return (
            f"<Router: in_use={self._in_use}/{self._local_capacity}"
            f" messages={self.waiting_messages} in {len(self._holding)} channels"
            f" ({self.stalled_channels} stalled), lent={len(self._loans)},"
            f" receivers waiting={self._waiting}>"
        )

    # Mailboxes: what comes in and what goes out

    def _put(self, channel: str, delivery: Delivery) -> None:
        mailbox = self._mailboxes.get(channel)
        if mailbox is None:
            mailbox = self._mailboxes[channel] = Mailbox(channel, delivery.arrived)
        messages = mailbox.messages
        if messages is None:
            mailbox.messages = (delivery,)
            self._holding[mailbox] = None
        else:
            if isinstance(messages, deque):
                messages.append(delivery)
            else:
                messages = mailbox.messages = deque((messages[0], delivery))
            if not mailbox.stalled and not mailbox.uncounted:
                mailbox.backlog = messages
        if mailbox.stalled:  # So it has no waiter.
            self._add_uncounted(mailbox, delivery)
            self._drop_overflow(mailbox)
        else:
            delivery.counting += 1
            waiter = mailbox.waiter
            if waiter is None:
                return
            if waiter.done() or mailbox.woken or mailbox.more_waiters:
                self._wake(mailbox)
            else:
                # The same without the calls, for a channel that waits for its next message.
                mailbox.waiter = None
                mailbox.woken = 1
                self._waiting -= 1
                try:  # noqa: SIM105 - as in _wake_up()
                    waiter.set_result(None)
                except RuntimeError:
                    pass

    def _pop(self, mailbox: Mailbox) -> Delivery:
        """Take out the oldest message, whatever becomes of it."""
        delivery = mailbox.popleft()
        if mailbox.messages is None:
            del self._holding[mailbox]
        if mailbox.uncounted:
            mailbox.uncounted -= 1
            delivery.uncounted -= 1
            if not delivery.uncounted:
                self._uncounted_bytes -= delivery.envelope.size
        else:
            self._uncount(delivery)
        return delivery

    def _hand_out(self, mailbox: Mailbox) -> dict[str, Any]:
        # What _pop() does, mostly without the calls: the path of each message.
        self._counters.received += 1
        if mailbox.uncounted:
            delivery = self._pop(mailbox)
        else:
            delivery = mailbox.popleft()
            is_last = mailbox.messages is None
            if is_last:
                del self._holding[mailbox]
            if delivery.counting > 1:
                delivery.counting -= 1
            else:
                self._uncount(delivery)
            if not is_last:
                return delivery.envelope.message()
        if mailbox.messages is None and mailbox.waiter is None and not mailbox.woken:
            # Most receivers come back at once and go on with this mailbox, as if it were new. It
            # is forgotten when the next one becomes idle.
            former, self._just_idle = self._just_idle, mailbox
            mailbox.patience = PATIENCE
            if former is not None and former.waiter is None and former is not mailbox:
                self._forget_if_idle(former)
        return delivery.envelope.message()

    def _lend(self, mailbox: Mailbox) -> Loan:
        messages = mailbox.messages
        assert messages is not None
        counts = not mailbox.uncounted
        delivery = messages[0]
        if counts:
            delivery.counting += 1  # the loan's, in place of the mailbox's
        self._pop(mailbox)
        loan = Loan(mailbox.channel, delivery, counts, self._clock())
        self._loans[loan] = None
        self._forget_if_idle(mailbox)
        return loan

    def _see_to_loans(self, now: float) -> None:
        """Those older than a second stop counting, and end if they have expired."""
        since = now - PATIENCE
        for loan in [loan for loan in self._loans if loan.lent_at < since]:
            self._stop_counting_loan(loan)
            if loan.delivery.arrived + self._local_expiry <= now:
                del self._loans[loan]
                self._counters.expired += 1
                self._report("expired", loan.channel)

    def _has_expired(self, mailbox: Mailbox, now: float) -> bool:
        """Whether its oldest message has."""
        messages = mailbox.messages
        return messages is not None and messages[0].arrived + self._local_expiry <= now

    def _drop_expired(self, mailbox: Mailbox, now: float) -> None:
        while self._has_expired(mailbox, now):
            self._pop(mailbox)
            self._counters.expired += 1
            self._report("expired", mailbox.channel)

    def _forget_if_idle(self, mailbox: Mailbox) -> None:
        if mailbox.is_idle and self._mailboxes.get(mailbox.channel) is mailbox:
            del self._mailboxes[mailbox.channel]
            if mailbox.stalled:
                self._stalled_channels -= 1

    # Receivers

    def _wake(self, mailbox: Mailbox) -> None:
        """Wake receivers as long as there are messages that are not set aside for others."""
        while len(mailbox.messages or ()) > mailbox.woken:
            waiter = mailbox.pop_waiter()
            if waiter is None:
                break
            mailbox.woken += 1
            self._waiting -= 1
            _wake_up(waiter)

    # Stalled channels, and what doesn't count

    def _find_stalled(self, now: float) -> None:
        if not self._is_held_up():
            return
        silent = [mailbox for mailbox in self._holding if mailbox.is_silent(now)]
        silent.sort(key=lambda mailbox: mailbox.active_at)
        for mailbox in silent:
            if not self._is_held_up():
                break
            self._stall(mailbox)

    def _stall(self, mailbox: Mailbox) -> None:
        mailbox.stalled = True
        self._stalled_channels += 1
        self._stop_counting(mailbox)
        self._drop_overflow(mailbox)

    def _note_reader(self, mailbox: Mailbox, now: float) -> None:
        if mailbox.stalled:
            self._stalled_channels -= 1
        mailbox.note_reader(now)

    def _is_held_up(self) -> bool:
        """Whether someone waits while others use much of ``local_capacity``."""
        return self._waiting > 0 and 2 * self._in_use >= self._local_capacity

    def _uncount(self, delivery: Delivery) -> None:
        """One mailbox that counted this delivery does so no more; the last one acks it."""
        delivery.counting -= 1
        if not delivery.counting:
            self._in_use -= 1
            if delivery.acker is not None:
                delivery.acker.ack(delivery.tag)
                delivery.acker = None

    def _stop_counting(self, mailbox: Mailbox) -> None:
        for delivery in islice(mailbox.messages or (), mailbox.uncounted, None):
            self._add_uncounted(mailbox, delivery)
            self._uncount(delivery)

    def _stop_counting_loan(self, loan: Loan) -> None:
        if loan.counts:
            loan.counts = False
            self._uncount(loan.delivery)

    def _add_uncounted(self, mailbox: Mailbox, delivery: Delivery) -> None:
        """Note that ``mailbox`` holds ``delivery``, the next after its uncounted ones, so too."""
        if not mailbox.uncounted:
            entry = (delivery.number, mailbox.channel, mailbox)
            heapq.heappush(self._uncounted_by_age, entry)
        mailbox.uncounted += 1
        mailbox.backlog = None
        if not delivery.uncounted:
            self._uncounted_bytes += delivery.envelope.size
        delivery.uncounted += 1

    def _drop_overflow(self, mailbox: Mailbox) -> None:
        """Keep the bounds of what doesn't count, after ``mailbox`` got more of it."""
        capacity = self._capacity_of(mailbox.channel)
        while mailbox.uncounted > capacity:
            self._overflow(mailbox)
        while self._uncounted_bytes > UNCOUNTED_BYTES:
            self._overflow(self._oldest_uncounted())

    def _overflow(self, mailbox: Mailbox) -> None:
        self._pop(mailbox)
        self._counters.overflowed += 1
        self._report("overflowed", mailbox.channel)
        self._forget_if_idle(mailbox)

    def _oldest_uncounted(self) -> Mailbox:
        """The mailbox that holds the oldest uncounted message (there is one)."""
        heap = self._uncounted_by_age
        while True:
            number, channel, mailbox = heap[0]
            if not mailbox.uncounted:
                heapq.heappop(heap)
                continue
            assert mailbox.messages is not None
            first = mailbox.messages[0].number
            if first == number:
                return mailbox
            heapq.heapreplace(heap, (first, channel, mailbox))

    def _list_uncounted(self) -> None:
        """Make the heap anew, so that it keeps no mailbox alive for long."""
        self._uncounted_by_age = [
            (mailbox.messages[0].number, mailbox.channel, mailbox)
            for mailbox in self._holding
            if mailbox.messages is not None and mailbox.uncounted
        ]
        heapq.heapify(self._uncounted_by_age)


def _wake_up(waiter: asyncio.Future[None]) -> None:
    try:  # noqa: SIM105 - suppress() is a call more for each message
        waiter.set_result(None)
    except RuntimeError:
        pass  # Its loop was closed under it, and runs nobody any more.
