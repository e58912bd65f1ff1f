"""What an ASGI server runs, without the lifespan protocol, of which many projects know nothing."""

from __future__ import annotations

from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application

django_application = get_asgi_application()

# Django has to be set up before these are imported.
from mysite.urls import websocket_urlpatterns  # noqa: E402 (see the line above)

routes = {"http": django_application, "websocket": URLRouter(websocket_urlpatterns)}

application = ProtocolTypeRouter(routes)
