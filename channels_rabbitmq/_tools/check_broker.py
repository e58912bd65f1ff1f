"""The steps of ``check`` on an open connection: the groups exchange, and permissions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import carehare

from .._amqp.connection import Connection
from .._amqp.errors import ACCESS_REFUSED
from .._amqp.methods import Exchange
from .._amqp.url import BrokerUrl
from .._broker.groups_exchange import GroupsExchange
from .._settings.settings import Settings
from .check_hints import advise_on, advise_on_permissions, describe_needs
from .check_permissions import READ, WRITE, Need, find_missing, needs_of
from .check_report import Finding, Status
from .check_trial import Broken


class BrokerSteps:
    """Each method is one step, for a ``LoopLayer`` whose id is ``id_``."""

    def __init__(
        self,
        connection: Connection,
        url: BrokerUrl,
        settings: Settings,
        id_: str,
        *,
        only_sends: bool,
    ) -> None:
        self._url = url
        self._settings = settings
        self._id = id_
        self._only_sends = only_sends
        self._connection = connection

    async def exchange(self) -> Finding:
        """Declare the exchange, or find it, as the layer does."""
        groups_exchange = GroupsExchange(self._settings.groups_exchange)
        amqp_channel = self._connection.open_topology()  # It goes on after a refusal.
        try:
            await groups_exchange.declare_on(lambda: amqp_channel)
        except carehare.ChannelClosedByServer as refusal:
            raise Broken(str(refusal), self._advise(refusal)) from None
        declare = groups_exchange.declare()
        assert isinstance(declare, Exchange.Declare)
        found = ", which somebody else has declared: it is used as it is" * declare.passive
        return Finding(f"{groups_exchange.name!r}{found}")

    def _advise(self, refusal: carehare.ChannelClosedByServer) -> str:
        if refusal.reply_code != ACCESS_REFUSED:
            return advise_on(refusal, self._url)
        return f"permit it, or have it declared by somebody who may: {self._permit()}"

    def _permit(self) -> str:
        exchange = self._settings.groups_exchange
        command = advise_on_permissions(self._url, exchange, only_sends=self._only_sends)
        return f"{command} (these take the place of the user's present patterns)"

    async def permissions(self) -> Finding:
        """Try each permission for each name that the layer uses, but to configure the exchange."""
        exchange = self._settings.groups_exchange
        needs = {Need(WRITE, False, exchange): True}
        if not self._only_sends:
            needs |= needs_of(self._id, self._settings)
        amqp_channel = self._connection.open_topology()
        missing = await find_missing(amqp_channel, needs, spare=f"{self._id}.check")
        if not missing:
            names = f"{exchange!r}" if self._only_sends else f"{exchange!r} and crq.*"
            return Finding(f"{len(needs)} tried, for {names}")
        is_needed = any(needs[need] for need in missing)
        told = describe_needs(missing, list(needs), self._id)
        text = f"the user {self._url.username!r} may not {told}"
        if not is_needed:
            return Finding(
                f"{text}: without that, some messages to groups are lost when a connection is",
                self._permit(),
                Status.WARNING,
            )
        advice = self._permit()
        if self._may_only_send(needs, missing):
            advice += "; or, if this process only sends: check --send-only"
        return Finding(text, advice, Status.FAILED)

    def _may_only_send(self, needs: Iterable[Need], missing: Sequence[Need]) -> bool:
        """Whether it has what it takes to send, and nothing of what it takes to receive."""
        own = [need for need in needs if need.name.startswith(self._id)]
        to_send = Need(WRITE, False, self._settings.groups_exchange)
        may = [need for need in own if need.permission != READ and need not in missing]
        return not self._only_sends and not may and to_send not in missing
