"""What Channels' tutorial types into a shell, with a channel that may be received from."""

from __future__ import annotations

import json
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.core.management.base import BaseCommand


class Command(BaseCommand):
    def handle(self, *args: Any, **options: Any) -> None:
        channel_layer: Any = get_channel_layer()
        channel = async_to_sync(channel_layer.new_channel)()
        async_to_sync(channel_layer.send)(channel, {"type": "hello"})
        heard = async_to_sync(channel_layer.receive)(channel)
        self.stdout.write(json.dumps(heard))
