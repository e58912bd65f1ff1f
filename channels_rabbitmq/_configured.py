"""The layers that a project has configured, for what is made of a layer's alias."""

from __future__ import annotations

from channels.exceptions import InvalidChannelLayerError
from channels.layers import get_channel_layer

from .core import RabbitmqChannelLayer


def configured_layer(alias: str) -> RabbitmqChannelLayer:
    """Return the layer of this key in ``CHANNEL_LAYERS``.

    Raises InvalidChannelLayerError if there is none, or it is another package's.
    """
    layer = get_channel_layer(alias)
    if layer is None:
        raise InvalidChannelLayerError(f"CHANNEL_LAYERS has no {alias!r}")
    if not isinstance(layer, RabbitmqChannelLayer):
        raise InvalidChannelLayerError(
            f"The channel layer {alias!r} is a {type(layer).__qualname__}, and not of "
            "channels_rabbitmq"
        )
    return layer
