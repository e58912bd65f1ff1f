"""The chat, and the websockets of the page that ``scripts/demo`` opens."""

from __future__ import annotations

import os

from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.urls import path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "demo.settings")

# Sets Django up, so it comes before the rest.
from chat.asgi import application as chat  # isort: skip
from chat.urls import websocket_urlpatterns

from demo.consumers import DemoConsumer

application = ProtocolTypeRouter(
    {
        **chat.application_mapping,
        "websocket": AllowedHostsOriginValidator(
            URLRouter(
                [
                    *websocket_urlpatterns,
                    path("demo/<room:room>/<int:window>/", DemoConsumer.as_asgi()),
                ]
            )
        ),
    }
)
