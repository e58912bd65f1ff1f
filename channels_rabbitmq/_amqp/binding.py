"""``TopologyChannel``: binds and unbinds."""

from __future__ import annotations

import asyncio
from collections import deque

import carehare

from .._futures import fail
from .channel import CHANNEL_OPEN, CallChannel, closed_by_server
from .methods import Channel


class TopologyChannel(CallChannel):
    """Binds and unbinds, any number at once, and goes on after a refusal.

    When the broker closes the AMQP channel over one call, that call fails. The calls behind it are
    written again, on a new AMQP channel.
    """

    def on_closed_by_server(self, frame: Channel.Close) -> None:
        calls, self._calls = self._calls, deque()
        self._answers.is_answered = True
        if calls:
            fail(calls.popleft()[1], closed_by_server(frame))
        try:
            self._host.add_channel(self._move_to)
        except carehare.ConnectionClosed as err:  # we are closing it
            for _, done, _ in calls:
                fail(done, err)
            return
        self._call(CHANNEL_OPEN, asyncio.get_running_loop().create_future())
        for _, done, method in calls:
            if method is not CHANNEL_OPEN:
                self._call(method, done)

    def _move_to(self, amqp_channel_id: int) -> TopologyChannel:
        self._amqp_channel_id = amqp_channel_id
        return self
