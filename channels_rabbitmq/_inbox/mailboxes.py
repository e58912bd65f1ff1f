"""``Mailboxes``: the mailboxes of one event loop's channels that hold or await a message."""

from __future__ import annotations

import heapq

from .mailbox import Mailbox


class Mailboxes:
    """Mailboxes by channel. Of the idle ones only the one that was read last is kept."""

    def __init__(self) -> None:
        self.by_channel: dict[str, Mailbox] = {}
        # The mailboxes that hold messages; a dict, for its order
        self.holding: dict[Mailbox, None] = {}
        self._just_idle: Mailbox | None = None

    def open(self, channel: str) -> Mailbox:
        """Return the mailbox of a channel; make it if there is none."""
        mailbox = self.by_channel.get(channel)
        if mailbox is None:
            mailbox = self.by_channel[channel] = Mailbox(channel)
        return mailbox

    def note_idle(self, mailbox: Mailbox) -> None:
        """Forget a mailbox that has handed out its last message, once another one is idle.

        Most receivers come back at once. They then go on with this mailbox instead of a new one.
        """
        former, self._just_idle = self._just_idle, mailbox
        if former is not None and former is not mailbox:
            self.forget_if_idle(former)

    def forget_if_idle(self, mailbox: Mailbox) -> None:
        if mailbox.is_idle and self.by_channel.get(mailbox.channel) is mailbox:
            del self.by_channel[mailbox.channel]

    def clear(self) -> list[Mailbox]:
        """Forget all mailboxes and return them."""
        mailboxes = list(self.by_channel.values())
        self.by_channel.clear()
        self.holding.clear()
        self._just_idle = None
        return mailboxes

    def __len__(self) -> int:
        """Return how many mailboxes are not idle. Any thread may call."""
        idle = self._just_idle
        is_there = idle is not None and idle.is_idle and self.by_channel.get(idle.channel) is idle
        return len(self.by_channel) - is_there

    def fullest(self, count: int) -> list[tuple[str, int]]:
        """Return the channels with the most messages that count, and their numbers."""
        held = ((mailbox.unacked, mailbox.channel) for mailbox in self.holding)
        return [(channel, n) for n, channel in heapq.nlargest(count, held) if n]

    def behind(self, since: float) -> list[tuple[str, int]]:
        """Return the relieved channels with a message from before ``since``, and their sizes."""
        return [
            (mailbox.channel, mailbox.size)
            for mailbox in self.holding
            if mailbox.early_acked
            and mailbox.first is not None
            and mailbox.first.arrived_at < since
        ]
