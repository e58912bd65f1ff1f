"""Bring deliveries to the channels of this event loop, and say when the broker may forget them.

This module has rules and no I/O: the clock, the acks and ``call_soon`` are passed in. Only
``receive()`` awaits, at one place.

**Receiving.** A waiting ``receive()`` is a future in the mailbox of its channel. Resolving the
future is only a wake-up; it carries no message. The woken coroutine takes the message itself, with
no ``await`` between taking and returning. So a ``receive()`` that is cancelled after its wake-up
has taken nothing, and it passes the wake-up on. Channels cancels one at each disconnect. One
message is *reserved* for each woken receiver: a new ``receive()`` takes a message only if the
mailbox holds more than the reserved ones.

**Accounting.** A delivery *counts* against ``local_capacity`` from its arrival until the last
mailbox that counts it has handed it out or dropped it. Then the delivery is acked, and the broker
sends another one, since its prefetch limit is ``local_capacity``. ``unacked`` is the number of
deliveries that count. So if all consumers are slow, the backlog grows on the broker, and senders
notice it.

**Relief.** The backlog of one channel must harm that channel only. It makes no difference whether
its consumer is stuck, slow or busy, or whether no consumer reads the channel any more. The rule
looks for harm, not for silence. As soon as half of ``local_capacity`` is in use *and* another
channel's ``receive()`` waits, the channels that hold most are relieved, until a quarter is in use.
The messages of a relieved channel are acked early, so they stop counting. They have other bounds:
``capacity`` messages for a channel, and ``EARLY_ACKED_BYTES`` for all channels together. Beyond
either bound the oldest messages are dropped, of the channel with the most messages or bytes. If no
``receive()`` waits, all consumers are slow, and all messages go on counting.

Relief waits until all woken receivers have run, because before that every channel of a burst seems
to be behind. Messages that arrive after a relief count again, until the next one. Messages that are
held when the connection is lost are treated as acked early, too, since they can't be acked any
more.

Simulations (``tests/unit/test_flow.py``) showed this. Among 1,000 channels, 50 that are stuck,
leaked or slow cost the others no message and no millisecond. A burst of one message each to 1,000
channels relieves none. With ten times the load that all consumers together can take, nothing is
dropped, and senders are refused. After minutes of such a load, with recipients chosen at random,
some messages expire here, counted and logged: 6 to 9 for each 100 received. Without relief they
expire on the broker, unseen. A burst of 1,000 messages to one consumer that works for half a
millisecond, while others wait, lost 879 with a ``capacity`` of 100. Hence the default is 10,000, as
many as the broker holds; the bound in bytes limits the memory that this takes.

**Handing over.** A receiver on another event loop can't take a message at the moment of its
wake-up: it may be cancelled before it hears of the message. So the message is handed over: it
leaves its mailbox and is acked. Then the receiver either *accepts* the message or has it
*requeued*. A requeued message goes before all that arrived after it, and is treated as acked early.
The messages that are being handed over have no bound here. There is at most one for each pending
``receive()``, and the application decides how many of these there are.

**Time.** No message waits in a mailbox longer than ``local_expiry``. ``receive()`` checks that for
its own channel; ``tick()`` checks it for channels that are not read.

Idle channels keep no state: only the mailbox that was read last stays, empty.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Container
from typing import TYPE_CHECKING, Any

from channels.exceptions import StopConsumer

from .accounting import Accounting
from .mailbox import Acker, Delivery, Mailbox
from .mailboxes import Mailboxes
from .relief import Relief

if TYPE_CHECKING:
    from .._codec import Envelope
    from ..statistics import Counters
    from .ages import Ages
    from .members import Members

# Seconds after which a relieved channel is reported: by then its consumer isn't just busy.
BEHIND = 1.0
# Seconds between two looks at what has expired.
TICK_INTERVAL = 0.25


class HandedOver:
    """A message on its way to a receiver on another event loop."""

    __slots__ = ("channel", "delivery")

    def __init__(self, channel: str, delivery: Delivery) -> None:
        self.channel = channel
        self.delivery = delivery

    def message(self) -> dict[str, Any]:
        """Return the message.

        For a direct message every call returns the same object. So the receiver may have it
        requeued only if no other code has seen it.
        """
        return self.delivery.envelope.message()


class Router:
    """The mailboxes of one event loop; to be used on its thread only.

    - ``local_capacity``: the consumer's prefetch count;
    - ``local_expiry``: seconds a message may wait here;
    - ``capacity_of(channel)``: messages kept for a channel beyond those that count;
    - ``ages`` gets the age of each received message;
    - ``report(reason, channel)`` is called for each message dropped: ``"expired"`` or
      ``"overflowed"``;
    - ``clock()``: seconds; it never goes back;
    - ``create_future()`` and ``call_soon(callback)``: the event loop's.

    None of these callables, nor any ``ack()``, may raise or call the router.

    Of the counters, ``enqueued``, ``consumed``, ``no_members``, ``expired`` and ``overflowed`` are
    kept here.
    """

    def __init__(
        self,
        *,
        members: Members,
        local_capacity: int,
        local_expiry: float,
        capacity_of: Callable[[str], int],
        counters: Counters,
        ages: Ages,
        report: Callable[[str, str], None],
        clock: Callable[[], float],
        create_future: Callable[[], asyncio.Future[None]],
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._members = members
        self._local_expiry = local_expiry
        self._counters = counters
        self._ages = ages
        self._report = report
        self._clock = clock
        self._create_future = create_future
        self._closed = False
        # What receive() raises once the router is closed
        self._closed_exc: type[BaseException] = StopConsumer
        self._mailboxes = Mailboxes()
        self._mailbox_of = self._mailboxes.by_channel.get
        self._holding = self._mailboxes.holding
        # Channels in which messages or receivers wait. Their names were checked before.
        self.known_channels: Container[str] = self._mailboxes.by_channel
        self._accounting = Accounting()
        self._relief = Relief(
            self._mailboxes,
            self._accounting,
            local_capacity=local_capacity,
            capacity_of=capacity_of,
            drop=self._drop_overflowing,
            call_soon=call_soon,
        )
        # Handed over, and neither accepted nor requeued
        self._handed_over: set[HandedOver] = set()
        # Deliveries so far; numbers them
        self._deliveries = 0
        # The clock's time of the next tick(), if anything is held
        self._next_tick_at = 0.0

    # From the broker

    def deliver(self, envelope: Envelope, tag: int, acker: Acker, age: float = 0.0) -> None:
        """Put a delivery into the mailbox of its channel, or of each member of its group.

        The caller calls this for each delivery, in the broker's order. ``age`` is how many seconds
        ago the message was published. The caller makes sure that a direct message is for a channel
        of this event loop. The router calls ``acker.ack(tag)`` once, and before this returns if no
        channel wants the message. It never calls it if the connection is lost or the router is
        closed before that. Afterwards :meth:`next_tick_at` may have changed from None to a moment.
        """
        if self._closed:
            return
        self._deliveries += 1
        now = self._clock()
        delivery = Delivery(envelope, tag, acker, now, now - age, self._deliveries)
        if not self._holding:
            self._next_tick_at = now + TICK_INTERVAL
        if envelope.group is None:
            assert envelope.channel is not None, "an envelope has one recipient"
            self._counters.enqueued += 1
            self._put(envelope.channel, delivery)
        else:
            self._put_into_all(self._members.channels(envelope.group), delivery)
        if delivery.unacked:
            self._accounting.unacked += 1
            if self._accounting.unacked >= self._relief.threshold:
                self._relief.consider()
        else:
            acker.ack(tag)

    def connection_lost(self) -> None:
        """Forget the acks of what is held; the messages stay, as if acked early.

        The caller calls this after a connection is gone and before the next one delivers. No
        earlier delivery is acked after this call.
        """
        held = list(self._holding)
        for mailbox in held:
            for delivery in mailbox.messages():
                delivery.acker = None
        for mailbox in held:
            self._accounting.ack_early(mailbox)
        assert self._accounting.unacked == 0
        self._relief.keep_bounds(held)

    # For consumers

    def receive_nowait(self, channel: str) -> dict[str, Any] | None:
        """Return the next message of ``channel`` as ``receive`` does; None if there is none now.

        Also None for any channel that isn't one of this event loop.
        """
        mailbox = self._mailbox_of(channel)
        if mailbox is None or (delivery := mailbox.first) is None:
            return None
        now = self._clock()
        if delivery.arrived_at + self._local_expiry <= now:
            self._drop_expired(mailbox, now)
            self._mailboxes.forget_if_idle(mailbox)
            if not mailbox.is_behind:
                return None
        elif mailbox.reserved:
            if not mailbox.is_behind:
                return None
        elif (rest := mailbox.rest) is not None and len(rest) > 1 and not mailbox.early_acked:
            # This does what _hand_out() does in a burst, without its calls. They would take a
            # quarter of the time that a member's copy takes.
            mailbox.first = rest.popleft()
            delivery.unacked -= 1
            if not delivery.unacked:
                self._accounting.ack(delivery)
            self._counters.consumed += 1
            age = now - delivery.published_at
            if age > self._ages.highest:
                self._ages.note(age, channel, now)
            envelope = delivery.envelope
            return envelope.message() if envelope.flat is None else envelope.flat.copy()
        return self._hand_out(mailbox, now)

    async def receive(
        self, channel: str, hand_out: Callable[[Mailbox, float], Any] | None = None
    ) -> Any:
        """Wait for the next message of ``channel`` and return the receiver's own copy.

        A call that is cancelled, at any moment, has changed nothing. Messages of a channel come in
        the order of their arrival. If several calls wait on one channel, each gets another message.
        Raises ``StopConsumer`` once the router is closed.

        ``hand_out(mailbox, now)`` takes the message out of its mailbox. Only ``hand_over`` passes
        one, when no message is there.
        """
        if hand_out is None:
            message = self.receive_nowait(channel)
            if message is not None:
                return message
            hand_out = self._hand_out
        if self._closed:
            raise self._closed_exc
        mailbox = self._mailbox_of(channel) or self._mailboxes.open(channel)
        waiter = self._create_future()
        mailbox.add_waiter(waiter)
        self._relief.waiting += 1
        if self._accounting.unacked >= self._relief.threshold:
            self._relief.consider()
        while True:
            try:
                await waiter
            except BaseException:
                self._discard_waiter(mailbox, waiter)
                raise
            if self._closed:
                raise self._closed_exc
            mailbox.reserved -= 1
            now = self._clock()
            if self._has_expired(mailbox, now):
                self._drop_expired(mailbox, now)
            if mailbox.first is not None:
                return hand_out(mailbox, now)
            # The message was dropped meanwhile. Wait again, as the first in line.
            waiter = self._create_future()
            mailbox.add_waiter_first(waiter)
            self._relief.waiting += 1

    def _discard_waiter(self, mailbox: Mailbox, waiter: asyncio.Future[None]) -> None:
        """Clean up after a cancelled receiver, whether it was woken or not."""
        if self._closed:
            return
        if waiter.done() and not waiter.cancelled():
            mailbox.reserved -= 1
            self._wake(mailbox)
        else:
            self._relief.waiting -= 1
            mailbox.remove_waiter(waiter)
        self._mailboxes.forget_if_idle(mailbox)

    # Handing over to another event loop

    async def hand_over(self, channel: str) -> HandedOver:
        """Wait like :meth:`receive`, for a receiver on another event loop.

        The caller ends the returned hand-over by :meth:`accept` or :meth:`requeue`. These do
        nothing once the router is closed.
        """
        mailbox = self._mailbox_of(channel)
        if mailbox is not None:
            now = self._clock()
            self._drop_expired(mailbox, now)
            if mailbox.is_behind:
                return self._hand_over(mailbox, now)
        handed_over: HandedOver = await self.receive(channel, self._hand_over)
        return handed_over

    def accept(self, handed_over: HandedOver) -> None:
        """End a hand-over: the receiver has the message."""
        if handed_over in self._handed_over:
            self._handed_over.remove(handed_over)
            self._counters.consumed += 1
            now = self._clock()
            age = now - handed_over.delivery.published_at
            if age > self._ages.highest:
                self._ages.note(age, handed_over.channel, now)

    def requeue(self, handed_over: HandedOver) -> None:
        """End a hand-over without a receiver: put the message back where it was.

        Afterwards :meth:`next_tick_at` may have changed from None to a moment.
        """
        if handed_over not in self._handed_over:
            return
        self._handed_over.remove(handed_over)
        channel, delivery = handed_over.channel, handed_over.delivery
        mailbox = self._mailboxes.open(channel)
        if not self._holding:
            self._next_tick_at = self._clock() + TICK_INTERVAL
        self._holding[mailbox] = None
        place = mailbox.insert(delivery)
        # All messages before it were requeued, too.
        assert place <= mailbox.early_acked, "the oldest are those acked early"
        self._accounting.note_early_acked(mailbox, delivery)
        self._relief.keep_bounds([mailbox])
        self._wake(mailbox)

    # The end

    def cancel_receivers(self) -> None:
        """Cancel every ``receive()``, before ``close``: its event loop will never run again."""
        self._closed_exc = asyncio.CancelledError
        for mailbox in list(self._mailboxes.by_channel.values()):
            while (waiter := mailbox.pop_waiter()) is not None:
                waiter.cancel()

    def close(self) -> None:
        """End every pending and later ``receive()`` with ``StopConsumer``; forget all messages.

        Acks nothing, since the queue is deleted with its connection. A second call changes nothing.
        """
        self._closed = True
        mailboxes = self._mailboxes.clear()
        self._handed_over.clear()
        self._accounting.clear()
        self._relief.waiting = 0
        for mailbox in mailboxes:
            while (waiter := mailbox.pop_waiter()) is not None:
                # No set_exception(): a receive() cancelled at this moment would never fetch it,
                # and asyncio would log that.
                _wake_up(waiter)

    # Time

    def next_tick_at(self) -> float | None:
        """Return the clock's time of the next :meth:`tick`; None if no message is held.

        Only :meth:`deliver` and :meth:`requeue` change it from None to a moment. The caller starts
        a timer when it isn't None, and re-arms the timer with the result of :meth:`tick` until that
        is None. A late tick only delays expiry and relief.
        """
        return self._next_tick_at if self._holding else None

    def tick(self) -> float | None:
        """Drop expired messages, relieve channels if others wait; return next_tick_at()."""
        now = self._clock()
        for mailbox in [mailbox for mailbox in self._holding if self._has_expired(mailbox, now)]:
            self._drop_expired(mailbox, now)
            self._mailboxes.forget_if_idle(mailbox)
        self._relief.relieve()
        self._ages.begin_window(now)
        self._next_tick_at = now + TICK_INTERVAL
        return self.next_tick_at()

    # For operators. Any thread may read the numbers; that costs the same however much is held.

    @property
    def unacked(self) -> int:
        """Deliveries that count against ``local_capacity``."""
        return self._accounting.unacked

    @property
    def waiting_messages(self) -> int:
        """Messages held in all channels; a group's message counts for each member."""
        if self._closed:
            return 0
        counters = self._counters
        gone = counters.consumed + counters.expired + counters.overflowed + len(self._handed_over)
        return max(0, counters.enqueued - gone)

    @property
    def messages_in_handoff(self) -> int:
        """Messages on their way to receivers on other event loops."""
        return len(self._handed_over)

    @property
    def channels(self) -> int:
        """How many channels hold messages or have a ``receive()`` waiting."""
        return len(self._mailboxes)

    @property
    def receivers(self) -> int:
        """How many ``receive()`` calls wait and were not woken."""
        return self._relief.waiting

    @property
    def stalled_channels(self) -> int:
        """How many channels hold messages that were acked early."""
        return self._accounting.stalled_channels

    @property
    def early_acked_bytes(self) -> int:
        """Bytes in memory of messages acked early and not received; see ``MESSAGE_OVERHEAD``."""
        return self._accounting.early_acked_bytes

    def fullest_channels(self, count: int = 5) -> list[tuple[str, int]]:
        """Return the channels with the most messages that count, and their numbers."""
        return self._mailboxes.fullest(count)

    def channels_behind(self) -> list[tuple[str, int]]:
        """Return the relieved channels with a message older than ``BEHIND``, and their sizes."""
        return self._mailboxes.behind(self._clock() - BEHIND)

    @property
    def idle(self) -> bool:
        """Whether no message is held or handed over and no ``receive()`` is waiting."""
        return not self._handed_over and not self.channels

    def __repr__(self) -> str:
        if self._closed:
            return "<Router: closed>"
        return (
            f"<Router: unacked={self._accounting.unacked} messages={self.waiting_messages}"
            f" in {len(self._holding)} channels ({self.stalled_channels} stalled),"
            f" in hand-off={len(self._handed_over)}, receivers waiting={self._relief.waiting}>"
        )

    # Mailboxes: putting messages in and taking them out

    def _put_into_all(self, channels: Collection[str], delivery: Delivery) -> None:
        counters = self._counters
        counters.enqueued += len(channels)
        if not channels:
            counters.no_members += 1
        mailbox_of, simple = self._mailbox_of, 0
        for channel in channels:
            mailbox = mailbox_of(channel)
            # This does what _put() does for a mailbox that holds several messages, without the
            # call. A burst to a large group is put 1.8 times as fast.
            if mailbox is not None and mailbox.rest is not None and mailbox.waiter is None:
                mailbox.rest.append(delivery)
                simple += 1
            else:
                self._put(channel, delivery)
        delivery.unacked += simple

    def _put(self, channel: str, delivery: Delivery) -> None:
        mailbox = self._mailbox_of(channel) or self._mailboxes.open(channel)
        if mailbox.first is None:
            self._holding[mailbox] = None
            mailbox.first = delivery
        else:
            mailbox.append(delivery)
        delivery.unacked += 1
        # A waiter in the mailbox gets this message: those before it are reserved.
        if mailbox.waiter is not None and (waiter := mailbox.pop_waiter()) is not None:
            mailbox.reserved += 1
            self._relief.waiting -= 1
            _wake_up(waiter)

    def _pop(self, mailbox: Mailbox) -> Delivery:
        """Take out the oldest message, to be handed out, handed over or dropped."""
        delivery = mailbox.popleft()
        if mailbox.first is None:
            del self._holding[mailbox]
        if mailbox.early_acked:
            self._accounting.release_early_acked(mailbox, delivery)
        else:
            delivery.unacked -= 1
            if not delivery.unacked:
                self._accounting.ack(delivery)
        return delivery

    def _hand_out(self, mailbox: Mailbox, now: float) -> dict[str, Any]:
        delivery = self._pop(mailbox)
        self._counters.consumed += 1
        age = now - delivery.published_at
        if age > self._ages.highest:
            self._ages.note(age, mailbox.channel, now)
        if mailbox.first is None and mailbox.waiter is None and not mailbox.reserved:
            self._mailboxes.note_idle(mailbox)
        return delivery.envelope.message()

    def _hand_over(self, mailbox: Mailbox, now: float) -> HandedOver:
        handed_over = HandedOver(mailbox.channel, self._pop(mailbox))
        self._handed_over.add(handed_over)
        self._mailboxes.forget_if_idle(mailbox)
        return handed_over

    def _has_expired(self, mailbox: Mailbox, now: float) -> bool:
        """Return whether the mailbox's oldest message has expired."""
        first = mailbox.first
        return first is not None and first.arrived_at + self._local_expiry <= now

    def _drop_expired(self, mailbox: Mailbox, now: float) -> None:
        while self._has_expired(mailbox, now):
            self._pop(mailbox)
            self._counters.expired += 1
            self._report("expired", mailbox.channel)

    # Receivers

    def _wake(self, mailbox: Mailbox) -> None:
        """Wake receivers as long as there are messages that are not reserved for others."""
        free = mailbox.size - mailbox.reserved
        while free > 0 and (waiter := mailbox.pop_waiter()) is not None:
            free -= 1
            mailbox.reserved += 1
            self._relief.waiting -= 1
            _wake_up(waiter)

    def _drop_overflowing(self, mailbox: Mailbox) -> None:
        self._pop(mailbox)
        self._counters.overflowed += 1
        self._report("overflowed", mailbox.channel)
        self._mailboxes.forget_if_idle(mailbox)


def _wake_up(waiter: asyncio.Future[None]) -> None:
    try:  # noqa: SIM105 - suppress() would cost one more call for each message
        waiter.set_result(None)
    except RuntimeError:
        pass  # The waiter's event loop is closed.
