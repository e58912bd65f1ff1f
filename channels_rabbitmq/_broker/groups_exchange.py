"""``GroupsExchange``: the exchange that all messages go through, ours or one that existed before.

The operator of the broker may have declared it (durable, auto-delete, with arguments), and a user
may lack the permission to configure it. It is used as it is, if it is a direct exchange.

**Declared first, and passively only if that is refused.** A passive declare doesn't tell the type
of an exchange. But a refused declare does: RabbitMQ compares the type first, and names the first
property that differs (3.10, 4.0 and 4.3). If that isn't the type, the type is right. The usual
start takes no additional round trip. A refusal costs one, once for all connections of an event
loop, because they share this object.

Users who may not configure the exchange aren't told its type: see ``Publisher.set_up``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import carehare

from .._amqp.channel import CallChannel
from .._amqp.errors import ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED
from .._amqp.methods import Exchange, Method

# Nobody can publish to an internal exchange.
_USABLE = re.compile("inequivalent arg '(?!type'|internal')")

_Channel = TypeVar("_Channel", bound=CallChannel)


class GroupsExchange:
    """Declares the groups exchange ``name`` as RabbitMQ has allowed it so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_passive = False  # It exists, so that only its existence is checked.
        self._denial: carehare.ChannelClosedByServer | None = None  # if we may not declare it

    def declare(self) -> Method:
        """Return the command that makes sure that it exists."""
        return Exchange.Declare(
            exchange=self.name, exchange_type="direct", passive=self._is_passive
        )

    async def declare_on(self, open_amqp_channel: Callable[[], _Channel]) -> _Channel:
        """Declare it on an AMQP channel, for each try on one from ``open_amqp_channel()``.

        Returns the last of them, which works. Raises ChannelClosedByServer if nothing helps.
        """
        while True:
            amqp_channel, command = open_amqp_channel(), self.declare()
            try:
                await amqp_channel.call(command)
                return amqp_channel
            except carehare.ChannelClosedByServer as err:
                if not self.on_refusal(command, err):
                    raise

    def on_refusal(self, command: Method, exc: carehare.ChannelClosedByServer) -> bool:
        """Return whether to try again, by a new ``declare()``, since ``command`` was refused.

        False if it was another command, or if nothing helps. Raises the first refusal if the
        exchange may not be declared and doesn't exist.
        """
        declare = Exchange.Declare
        if not isinstance(command, declare) or command.exchange != self.name:
            return False
        if not command.passive:
            return self._look_for_it(exc)
        if exc.reply_code != NOT_FOUND:
            return False
        self._is_passive = False
        if self._denial is not None:
            denial, self._denial = self._denial, None
            raise denial
        return True

    def _look_for_it(self, exc: carehare.ChannelClosedByServer) -> bool:
        if exc.reply_code == ACCESS_REFUSED:
            self._denial = exc
        elif exc.reply_code != PRECONDITION_FAILED or not _USABLE.search(str(exc)):
            return False
        self._is_passive = True
        return True
