"""``Stage``: how far an attempt to connect has come."""

from __future__ import annotations

import enum


class Stage(enum.IntEnum):
    """What one side has heard of the other, in this order."""

    TCP = 1  # A server has accepted the connection.
    SECURED = 2  # TLS, if there is any, is agreed on.
    GREETED = 3  # It is RabbitMQ.
    LOGGED_IN = 4
    OPEN = 5  # The virtual host is there, and the user may use it.
