"""What an ASGI server runs: pages go to Django, websockets to the consumer.

Run it with ``uvicorn chat.asgi:application``.
"""

from __future__ import annotations

import os

from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

from channels_rabbitmq.lifespan import LifespanApp

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "chat.settings")
django_application = get_asgi_application()

# Django has to be set up before these are imported.
from chat.urls import websocket_urlpatterns  # noqa: E402 (see the line above)

application = ProtocolTypeRouter(
    {
        # Serving the static files here spares the example a web server in front of it.
        "http": ASGIStaticFilesHandler(django_application),
        # Browsers let any site open a websocket to any other; this refuses foreign ones.
        "websocket": AllowedHostsOriginValidator(URLRouter(websocket_urlpatterns)),
        # Connects to RabbitMQ before the first page comes, and says goodbye at the end.
        "lifespan": LifespanApp(),
    }
)
