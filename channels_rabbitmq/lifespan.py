"""``LifespanApp``: connects when an ASGI server starts, and closes when it ends."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from channels.exceptions import InvalidChannelLayerError
from channels.layers import get_channel_layer

from .core import RabbitmqChannelLayer
from .exceptions import BrokerUnavailable

logger = logging.getLogger("channels_rabbitmq.lifespan")


class LifespanApp:
    """An ASGI application for the scope ``"lifespan"``, to be put into a ``ProtocolTypeRouter``::

        application = ProtocolTypeRouter(
            {
                "http": django_application,
                "websocket": URLRouter(...),
                "lifespan": LifespanApp(),
            }
        )

    At start-up it connects the channel layer. If that takes longer than ``operation_timeout`` the
    server starts all the same, with a warning in the log, and the layer goes on trying. With
    ``fail_fast`` the server doesn't start, and says why, if the first attempt fails (with several
    URLs, one at each). At shutdown, when the server has ended its own connections, it closes the
    layer.

    ``channel_layer_alias`` is the layer's key in ``CHANNEL_LAYERS``. A layer of another package,
    such as the one in memory for tests, is left alone.
    """

    def __init__(self, channel_layer_alias: str = "default", *, fail_fast: bool = False) -> None:
        self._channel_layer_alias = channel_layer_alias
        self._fail_fast = fail_fast

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        """Serve the protocol until the server shuts down. The server calls it on its loop."""
        if scope["type"] != "lifespan":
            raise ValueError(f"LifespanApp serves the scope 'lifespan', not {scope['type']!r}")
        await receive()  # "lifespan.startup": ASGI has them in this order, and no others
        try:
            layer = await self._connect()
        except Exception as err:
            await send({"type": "lifespan.startup.failed", "message": f"LifespanApp: {err}"})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()  # "lifespan.shutdown"
        if layer is not None:
            await layer.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _connect(self) -> RabbitmqChannelLayer | None:
        """Connect the layer and return it; None if it is another package's.

        An exception says why the server can't start.
        """
        layer = get_channel_layer(self._channel_layer_alias)
        if layer is None:
            raise InvalidChannelLayerError(f"CHANNEL_LAYERS has no {self._channel_layer_alias!r}")
        if not isinstance(layer, RabbitmqChannelLayer):
            return None
        try:
            await layer.connect(fail_fast=self._fail_fast)
        except BrokerUnavailable as err:
            if self._fail_fast:
                await layer.close()
                raise
            logger.warning("started without a connection: %s", err)
        return layer
