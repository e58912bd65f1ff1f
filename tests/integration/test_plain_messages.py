"""Messages of Django's lazy texts and the like, through a broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import django
from asgiref.sync import async_to_sync
from django.conf import settings
from django.utils import translation
from django.utils.translation import gettext_lazy

from channels_rabbitmq.core import RabbitmqChannelLayer

if not settings.configured:
    settings.configure()
django.setup()  # translations need it


OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


async def test_lazy_texts_are_in_the_callers_language(open_layer: OpenLayer) -> None:
    """Sync code's messages are encoded on another thread's event loop."""
    layer = await open_layer()
    channel = await layer.new_channel()

    def view() -> None:
        with translation.override("de"):
            async_to_sync(layer.send)(channel, {"text": gettext_lazy("Sunday")})
        async_to_sync(layer.close)()

    await asyncio.to_thread(view)
    assert await asyncio.wait_for(layer.receive(channel), 10) == {"text": "Sonntag"}
