"""The channel layers of a Django project, for the commands.

Django is imported here, and only when it is needed.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import Misuse

if TYPE_CHECKING:
    from ..core import RabbitmqChannelLayer

# A password may hold anything, so: up to the last @ of the line.
_CREDENTIALS = re.compile(r"://.*@")
_VARIABLE = "DJANGO_SETTINGS_MODULE"


def find_layer(alias: str) -> RabbitmqChannelLayer:
    """Return the layer ``alias`` of ``CHANNEL_LAYERS``.

    Raises Misuse if there are no settings, no such layer, or it is another package's. Raises
    InvalidChannelLayerError if its ``BACKEND`` or ``CONFIG`` is wrong: the text tells of all
    mistakes.
    """
    configs = _load_configs()
    if alias not in configs:
        known = ", ".join(map(repr, configs)) or "nothing"
        raise Misuse(f"CHANNEL_LAYERS has no {alias!r}; it has {known}")
    layers = importlib.import_module("channels.layers")
    layer_class: type[RabbitmqChannelLayer] = importlib.import_module(
        "channels_rabbitmq.core"
    ).RabbitmqChannelLayer
    try:
        layer: object = layers.channel_layers[alias]
    except ValueError:  # InvalidChannelLayerError is one.
        raise
    except Exception as err:
        raise Misuse(f"the channel layer {alias!r} can't be made: {tell(err)}") from None
    if not isinstance(layer, layer_class):
        backend = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise Misuse(f"the channel layer {alias!r} is {backend}, and not of channels_rabbitmq")
    return layer


def _load_configs() -> Mapping[str, Any]:
    try:
        django = importlib.import_module("django")
        settings = importlib.import_module("django.conf").settings
    except ImportError as err:
        raise Misuse(f"Django can't be imported: {tell(err)}") from None
    if not settings.configured and not os.environ.get(_VARIABLE):
        raise Misuse(f"no settings: set {_VARIABLE}, or give --settings MODULE")
    try:
        django.setup()
        configs = getattr(settings, "CHANNEL_LAYERS", {})
    except Exception as err:  # The project's modules may raise any exception.
        raise Misuse(f"Django's settings can't be loaded: {tell(err)}") from None
    if not isinstance(configs, Mapping):
        raise Misuse(f"CHANNEL_LAYERS must be a dict, not {type(configs).__qualname__}")
    return configs


def is_in_memory(layer_class: type[RabbitmqChannelLayer]) -> bool:
    """Whether this is the layer for tests, which uses no broker."""
    memory = sys.modules.get("channels_rabbitmq.testing.memory")
    return memory is not None and issubclass(layer_class, memory.InMemoryChannelLayer)


def tell(error: BaseException) -> str:
    """Return one line about an error of the project's code, without the password of a URL."""
    return _CREDENTIALS.sub("://...@", f"{type(error).__name__}: {error}".replace("\n", " "))
