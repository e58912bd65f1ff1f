"""``Mailboxes``: those of all channels of one event loop that hold or await a message."""

from __future__ import annotations

import heapq

from .mailbox import Mailbox


class Mailboxes:
    """By channel; an idle one is forgotten, but for the one that handed out the last message."""

    def __init__(self) -> None:
        self.by_channel: dict[str, Mailbox] = {}
        # Those that hold messages (a dict for its order)
        self.holding: dict[Mailbox, None] = {}
        self._just_idle: Mailbox | None = None

    def open(self, channel: str) -> Mailbox:
        """Return the mailbox of a channel."""
        mailbox = self.by_channel.get(channel)
        if mailbox is None:
            mailbox = self.by_channel[channel] = Mailbox(channel)
        return mailbox

    def note_idle(self, mailbox: Mailbox) -> None:
        """Forget a mailbox which has handed out its last message, once the next one is idle.

        Most receivers come back at once and go on with it, as if it were new.
        """
        former, self._just_idle = self._just_idle, mailbox
        if former is not None and former is not mailbox:
            self.forget_if_idle(former)

    def forget_if_idle(self, mailbox: Mailbox) -> None:
        if mailbox.is_idle and self.by_channel.get(mailbox.channel) is mailbox:
            del self.by_channel[mailbox.channel]

    def clear(self) -> list[Mailbox]:
        """Forget all; return them."""
        mailboxes = list(self.by_channel.values())
        self.by_channel.clear()
        self.holding.clear()
        self._just_idle = None
        return mailboxes

    def __len__(self) -> int:
        """How many are not idle. From any thread."""
        idle = self._just_idle
        is_there = idle is not None and idle.is_idle and self.by_channel.get(idle.channel) is idle
        return len(self.by_channel) - is_there

    def fullest(self, count: int) -> list[tuple[str, int]]:
        """The channels with the most messages that count, and how many."""
        held = ((mailbox.unacked, mailbox.channel) for mailbox in self.holding)
        return [(channel, n) for n, channel in heapq.nlargest(count, held) if n]

    def behind(self, since: float) -> list[tuple[str, int]]:
        """The relieved channels that hold a message from before ``since``, and how many."""
        return [
            (mailbox.channel, mailbox.size)
            for mailbox in self.holding
            if mailbox.early_acked
            and mailbox.first is not None
            and mailbox.first.arrived_at < since
        ]
