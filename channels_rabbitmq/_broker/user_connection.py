"""``UserConnection``: the connection behind ``carehare_connection``."""

from __future__ import annotations

import carehare

from .._amqp.connection import Connection
from .._carehare.connection import CarehareConnection
from .._settings.settings import Settings
from .shared import Shared
from .supervisor import Supervisor


class UserConnection:
    """The connection behind ``carehare_connection``: for the user's own queues, nothing set up."""

    name = "carehare_connection"

    def __init__(self, settings: Settings, id_: str, shared: Shared) -> None:
        self.supervisor = Supervisor(self, settings, id_=id_, shared=shared)

    async def wait_ready(self, deadline: float) -> carehare.Connection:
        """Return it once it is open: see ``Supervisor.wait_ready``."""
        await self.supervisor.wait_ready(deadline)
        return self._for_user

    async def set_up(self, connection: Connection) -> None:
        self._for_user = CarehareConnection(connection)

    def on_ready(self) -> None:
        pass

    def on_lost(self, reason: str) -> None:
        pass
