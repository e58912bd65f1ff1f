"""The route to each process's channels."""

from __future__ import annotations

import re

from .._amqp.publishing import Route
from .._identity import id_of
from .topology import direct_routing_key

# Until 6.0: the queue of a channels_rabbitmq 4.x has its id as its name.
_VERSION_4_ID = re.compile("channels_[A-Za-z]{12}")
_MOST_ROUTES = 1000  # that are remembered


class Routes:
    """Routes of direct messages, by the id in the channel's name."""

    def __init__(self, groups_exchange: str) -> None:
        self._groups_exchange = groups_exchange
        self._routes: dict[str, Route] = {}  # by id

    def to_channel(self, channel: str) -> Route:
        """Return the route to the process that made the channel."""
        id_ = id_of(channel)
        route = self._routes.get(id_)
        if route is None:
            if len(self._routes) >= _MOST_ROUTES:
                self._routes.clear()  # Most of their processes are gone.
            route = self._routes[id_] = self.to_id(id_)
        return route

    def to_id(self, id_: str) -> Route:
        """Return the route to the ``LoopLayer`` with that id."""
        if _VERSION_4_ID.fullmatch(id_):
            return Route("", id_, mandatory=True)  # by the default exchange
        return Route(self._groups_exchange, direct_routing_key(id_), mandatory=True)
