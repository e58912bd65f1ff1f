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
from .hand_overs import HandOvers
from .mailbox import Acker, Delivery, Mailbox
from .mailboxes import Mailboxes, wake_up
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
    kept by it and its parts.
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
        self._clock = clock
        self._create_future = create_future
        self._closed = False
        # What receive() raises once the router is closed
        self._closed_exc: type[BaseException] = StopConsumer
        self._accounting = Accounting()
        self._mailboxes = Mailboxes(self._accounting, counters, report)
        self._mailbox_of = self._mailboxes.by_channel.get
        # Channels in which messages or receivers wait. Their names were checked before.
        self.known_channels: Container[str] = self._mailboxes.by_channel
        self._relief = Relief(
            self._mailboxes,
            self._accounting,
            local_capacity=local_capacity,
            capacity_of=capacity_of,
            call_soon=call_soon,
        )
        self.hand_overs = HandOvers(
            self.receive, self._mailboxes, self._accounting, self._relief, counters, ages, clock
        )
        # Deliveries so far; numbers them
        self._deliveries = 0

    # From the broker

    def deliver(self, envelope: Envelope, tag: int, acker: Acker, age: float = 0.0) -> None:
        """Put a delivery into the mailbox of its channel, or of each member of its group.

        The caller calls this for each delivery, in the broker's order. ``age`` is how many seconds
        ago the message was published. The caller makes sure that a direct message is for a channel
        of this event loop. The router calls ``acker.ack(tag)`` once, and before this returns if no
        channel wants the message. It never calls it if the connection is lost or the router is
        closed before that.
        """
        if self._closed:
            return
        self._deliveries += 1
        now = self._clock()
        delivery = Delivery(
            envelope, tag, acker, now + self._local_expiry, now - age, self._deliveries
        )
        if envelope.group is None:
            channel = envelope.channel
            assert channel is not None, "an envelope has one recipient"
            self._counters.enqueued += 1
            self._put(self._mailbox_of(channel) or self._mailboxes.open(channel), delivery)
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
        held = list(self._mailboxes.holding)
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
        if mailbox.reserved or delivery.expires_at <= now:
            self._mailboxes.drop_expired(mailbox, now)
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
            if now - delivery.published_at > self._ages.highest:
                self._ages.note(now - delivery.published_at, channel, now)
            envelope = delivery.envelope
            return envelope.message() if envelope.flat is None else envelope.flat.copy()
        return self._hand_out(mailbox, now)

    async def receive(
        self, channel: str, take: Callable[[Mailbox, float], Any] | None = None
    ) -> Any:
        """Wait for the next message of ``channel`` and return the receiver's own copy.

        A call that is cancelled, at any moment, has changed nothing. Messages of a channel come in
        the order of their arrival. If several calls wait on one channel, each gets another message.
        Raises ``StopConsumer`` once the router is closed.

        ``take(mailbox, now)`` takes the message out of its mailbox. Only ``HandOvers`` passes one.
        """
        if take is None:
            take = self._hand_out
        mailbox = self._mailbox_of(channel) or self._open(channel)
        if mailbox.first is not None:
            now = self._clock()
            self._mailboxes.drop_expired(mailbox, now)
            if mailbox.is_behind:
                return take(mailbox, now)
        waiter = self._create_future()
        mailbox.add_waiter(waiter)
        self._mailboxes.waiting_receivers += 1
        if self._accounting.unacked >= self._relief.threshold:
            self._relief.consider()
        while True:
            try:
                await waiter
            except BaseException:
                if not self._closed:
                    self._mailboxes.discard_waiter(mailbox, waiter)
                raise
            if self._closed:
                raise self._closed_exc
            mailbox.reserved -= 1
            now = self._clock()
            if mailbox.first is not None and mailbox.first.expires_at <= now:
                self._mailboxes.drop_expired(mailbox, now)
            if mailbox.first is not None:
                return take(mailbox, now)
            # The message was dropped meanwhile. Wait again, as the first in line.
            waiter = self._create_future()
            mailbox.add_waiter_first(waiter)
            self._mailboxes.waiting_receivers += 1

    def _open(self, channel: str) -> Mailbox:
        if self._closed:
            raise self._closed_exc
        return self._mailboxes.open(channel)

    def flush(self) -> None:
        """Drop all messages that no receiver has got; those who wait go on waiting."""
        if not self._closed:
            self._mailboxes.drop_all()

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
        self.hand_overs.clear()
        self._accounting.clear()
        for mailbox in mailboxes:
            while (waiter := mailbox.pop_waiter()) is not None:
                # No set_exception(): a receive() cancelled at this moment would never fetch it,
                # and asyncio would log that.
                wake_up(waiter)

    # Time

    @property
    def holds_messages(self) -> bool:
        """Whether :meth:`tick` is due every ``TICK_INTERVAL``."""
        return bool(self._mailboxes.holding)

    def tick(self) -> None:
        """Drop expired messages, relieve channels if others wait.

        A late tick only delays that.
        """
        now = self._clock()
        self._mailboxes.drop_all_expired(now)
        self._relief.relieve()
        self._ages.begin_window(now)

    # For operators. Any thread may read the numbers; that costs the same however much is held.

    @property
    def unacked(self) -> int:
        """Deliveries that count against ``local_capacity``."""
        return self._accounting.unacked

    @property
    def buffered(self) -> int:
        """Messages held in all channels; a group's message counts for each member."""
        if self._closed:
            return 0
        counters = self._counters
        dropped = counters.expired + counters.overflowed + counters.flushed
        gone = counters.consumed + dropped + len(self.hand_overs)
        return max(0, counters.enqueued - gone)

    @property
    def channels(self) -> int:
        """How many channels hold messages or have a ``receive()`` waiting."""
        return len(self._mailboxes)

    @property
    def receivers(self) -> int:
        """How many ``receive()`` calls wait and were not woken."""
        return self._mailboxes.waiting_receivers

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
        return self._mailboxes.relieved(self._clock() - BEHIND + self._local_expiry)

    def oldest(self) -> tuple[str, int, float] | None:
        """Return the channel with the oldest message, its messages, and that one's wait in seconds.

        None if no channel holds one. It looks at all channels that do: not from another thread.
        """
        mailbox = self._mailboxes.oldest()
        if mailbox is None or mailbox.first is None:
            return None
        waited = self._clock() - (mailbox.first.expires_at - self._local_expiry)
        return mailbox.channel, mailbox.size, max(0.0, waited)

    @property
    def idle(self) -> bool:
        """Whether no message is held or handed over and no ``receive()`` is waiting."""
        return not self.hand_overs and not self.channels

    def __repr__(self) -> str:
        if self._closed:
            return "<Router: closed>"
        return (
            f"<Router: unacked={self._accounting.unacked} messages={self.buffered}"
            f" in {len(self._mailboxes.holding)} channels ({self.stalled_channels} stalled),"
            f" in hand-off={len(self.hand_overs)}, receivers waiting={self.receivers}>"
        )

    # Mailboxes: putting messages in and taking them out

    def _put_into_all(self, channels: Collection[str], delivery: Delivery) -> None:
        counters = self._counters
        counters.enqueued += len(channels)
        if not channels:
            counters.no_members += 1
        mailbox_of, simple = self._mailbox_of, 0
        for channel in channels:
            mailbox = mailbox_of(channel) or self._mailboxes.open(channel)
            # This does what _put() does for a mailbox that holds several messages, without the
            # call. A burst to a large group is put 1.8 times as fast.
            if mailbox.rest is not None and mailbox.waiter is None:
                mailbox.rest.append(delivery)
                simple += 1
            else:
                self._put(mailbox, delivery)
        delivery.unacked += simple

    def _put(self, mailbox: Mailbox, delivery: Delivery) -> None:
        if mailbox.first is None:
            self._mailboxes.holding[mailbox] = None
            mailbox.first = delivery
        else:
            mailbox.append(delivery)
        delivery.unacked += 1
        # A waiter in the mailbox gets this message: those before it are reserved.
        if mailbox.waiter is not None and (waiter := mailbox.pop_waiter()) is not None:
            mailbox.reserved += 1
            self._mailboxes.waiting_receivers -= 1
            waiter.set_result(None)

    def _hand_out(self, mailbox: Mailbox, now: float) -> dict[str, Any]:
        delivery = self._mailboxes.pop(mailbox)
        self._counters.consumed += 1
        if now - delivery.published_at > self._ages.highest:
            self._ages.note(now - delivery.published_at, mailbox.channel, now)
        return delivery.envelope.message()
