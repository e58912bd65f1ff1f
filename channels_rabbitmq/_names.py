"""Check names of channels and groups, and texts, by the channel layer specification."""

from __future__ import annotations

import re

# The specification allows ASCII only. Channels' own expressions also accept other digits, and a
# line feed at the end.
_CHANNEL = re.compile(r"[a-zA-Z0-9._-]+(?:![a-zA-Z0-9._-]*)?")
_GROUP = re.compile(r"[a-zA-Z0-9._-]+")
LONGEST = 99  # as in BaseChannelLayer: "length < 100"
_RULE = "it must be a str of at most 99 ASCII letters, digits, hyphens, underscores and periods"


def require_channel_name(name: object) -> None:
    """Raise TypeError unless ``name`` is a valid name of a channel."""
    if not (isinstance(name, str) and len(name) <= LONGEST and _CHANNEL.fullmatch(name)):
        raise TypeError(f"Invalid channel name {name!r}: {_RULE}, with at most one '!' among them")


def require_group_name(name: object) -> None:
    """Raise TypeError unless ``name`` is a valid name of a group."""
    if not (isinstance(name, str) and len(name) <= LONGEST and _GROUP.fullmatch(name)):
        raise TypeError(f"Invalid group name {name!r}: {_RULE}")


def is_encodable(text: str) -> bool:
    """Whether a text can be encoded: it has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
