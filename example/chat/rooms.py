"""Which names rooms may have."""

from __future__ import annotations

import re

# A room's name becomes part of a group's name: Channels allows ASCII letters, digits, hyphens,
# underscores and periods there, and fewer than 100 characters.
ROOM_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.-]{0,39}"


def is_room(name: str) -> bool:
    return re.fullmatch(ROOM_PATTERN, name) is not None


def group_of(room: str) -> str:
    return f"chat.{room}"


class RoomConverter:
    """``<room:...>`` in an URL pattern."""

    regex = ROOM_PATTERN

    def to_python(self, value: str) -> str:
        return value

    def to_url(self, value: str) -> str:
        return value
