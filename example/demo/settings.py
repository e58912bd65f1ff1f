"""The chat's settings, and two hooks of the channel layer: the page shows outages at once."""

from __future__ import annotations

from chat.settings import *  # noqa: F403 (settings that build upon others)
from chat.settings import CHANNEL_LAYERS

ASGI_APPLICATION = "demo.asgi.application"

CHANNEL_LAYERS["default"]["CONFIG"] |= {
    "on_disconnect": "demo.outages.begin",
    "on_reconnect": "demo.outages.end",
}
