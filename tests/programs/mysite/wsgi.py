"""What a WSGI server runs. With ``USE_BEFORE_FORK`` the layer is used when this is imported."""

from __future__ import annotations

import os
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.core.wsgi import get_wsgi_application

application = get_wsgi_application()

if os.environ.get("USE_BEFORE_FORK"):
    layer: Any = get_channel_layer()
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.send)(channel, {"type": "hello"})
    assert async_to_sync(layer.receive)(channel) == {"type": "hello"}
