"""Layers as a project has them, for the tests of the manual."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # as in tests/conftest.py
    from channels_rabbitmq.core import RabbitmqChannelLayer

    OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]
    OpenFromSettings = Callable[[dict[str, Any]], Awaitable[RabbitmqChannelLayer]]


@pytest.fixture(scope="session")
def django_settings() -> None:
    """Django's defaults, for tests that ask nothing else of a project."""
    import django
    from django.conf import settings

    if not settings.configured:
        settings.configure()
        django.setup()


@pytest.fixture
async def open_from_settings(open_layer: OpenLayer, django_settings: None) -> OpenFromSettings:
    """Opens the layer of a block with ``CHANNEL_LAYERS`` as Django and Channels do."""
    from channels.layers import ChannelLayerManager
    from django.test import override_settings

    from channels_rabbitmq.core import RabbitmqChannelLayer

    async def open_one(namespace: dict[str, Any]) -> RabbitmqChannelLayer:
        with override_settings(CHANNEL_LAYERS=namespace["CHANNEL_LAYERS"]):
            assert isinstance(ChannelLayerManager()["default"], RabbitmqChannelLayer)
        return await open_layer(**namespace["CHANNEL_LAYERS"]["default"]["CONFIG"])

    return open_one


@pytest.fixture
async def default_layer(
    open_layer: OpenLayer, django_settings: None
) -> AsyncIterator[RabbitmqChannelLayer]:
    """What ``get_channel_layer()`` returns during the test."""
    from asgiref.sync import async_to_sync
    from channels.layers import channel_layers

    layer = await open_layer()
    channel_layers.set("default", layer)
    yield layer
    await asyncio.to_thread(lambda: async_to_sync(layer.close)())
    del channel_layers.backends["default"]
