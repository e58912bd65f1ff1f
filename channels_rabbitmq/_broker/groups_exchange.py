"""``GroupsExchange``: the exchange that all messages go through, ours or one that was there before.

Whoever operates the broker may have declared it (durable, auto-delete, with arguments), and a user
may lack the permission to configure it. It is used as it is, if it is a direct exchange.

**Declared first, and only if that is refused, asked for.** A passive declare doesn't say what type
an exchange has. RabbitMQ compares the type first, and names the first property that differs (3.10,
4.0 and 4.3): if that isn't the type, it is the right one. The usual start takes no round trip more;
one that was refused takes one more, for all connections together: they share what was found out.

A user who may not configure the exchange isn't told its type: see ``Publisher.set_up``.
"""

from __future__ import annotations

import re

import carehare
import pamqp.base
import pamqp.commands

# AMQP 0-9-1, section 1.2
_ACCESS_REFUSED = 403
_NOT_FOUND = 404
_PRECONDITION_FAILED = 406

# Nobody can publish to an internal exchange.
_USABLE = re.compile("inequivalent arg '(?!type'|internal')")


class GroupsExchange:
    """How the groups exchange ``name`` is to be declared, by what the broker has said so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_given = False  # and not for us to declare
        self._not_ours: carehare.ChannelClosedByServer | None = None  # why, if it isn't permitted

    def declare(self) -> pamqp.base.Frame:
        """Return the method that makes sure that it is there."""
        return pamqp.commands.Exchange.Declare(
            exchange=self.name, exchange_type="direct", passive=self._is_given
        )

    def accept_refusal(self, method: pamqp.base.Frame, exc: carehare.ChannelClosedByServer) -> bool:
        """Return whether to try again, by a new ``declare()``; ``method`` was refused.

        False if it was another method, or if nothing helps. Raises the first refusal if it may not
        be declared and isn't there.
        """
        if not isinstance(method, pamqp.commands.Exchange.Declare) or method.exchange != self.name:
            return False
        if not method.passive:
            return self._look_for_it(exc)
        if exc.reply_code != _NOT_FOUND:
            return False
        self._is_given = False
        if self._not_ours is not None:
            not_ours, self._not_ours = self._not_ours, None
            raise not_ours
        return True

    def _look_for_it(self, exc: carehare.ChannelClosedByServer) -> bool:
        if exc.reply_code == _ACCESS_REFUSED:
            self._not_ours = exc
        elif exc.reply_code != _PRECONDITION_FAILED or not _USABLE.search(str(exc)):
            return False
        self._is_given = True
        return True
