"""What an ASGI server runs that knows the lifespan protocol."""

from __future__ import annotations

import os

from channels.routing import ProtocolTypeRouter

from channels_rabbitmq.lifespan import LifespanApp
from mysite.asgi import routes

application = ProtocolTypeRouter(
    {**routes, "lifespan": LifespanApp(fail_fast=bool(os.environ.get("FAIL_FAST")))}
)
