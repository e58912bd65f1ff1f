"""A plugin of a project: it uses a layer before the tests do, and its event loop stops then."""

from __future__ import annotations

import asyncio
import atexit

import django

django.setup()

from channels.layers import get_channel_layer  # noqa: E402 (Django has to be set up)

loop = asyncio.new_event_loop()
loop.run_until_complete(get_channel_layer().group_send("room", {"type": "early"}))
atexit.register(loop.close)
