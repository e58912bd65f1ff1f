"""For the tests of projects: a layer in memory, and tests on RabbitMQ that don't meet each other.

``channels_rabbitmq.testing.pytest_plugin`` is for pytest, ``ChannelLayerMixin`` for Django's tests.
"""

from ..core import RabbitmqChannelLayer
from ._run import find
from .memory import InMemoryChannelLayer
from .mixin import ChannelLayerMixin

__all__ = ["ChannelLayerMixin", "InMemoryChannelLayer", "exchange_of"]


def exchange_of(layer: RabbitmqChannelLayer) -> str:
    """Return the groups exchange that a layer has in the tests of this process.

    For programs that a test starts, which publish to it or have a layer of their own.
    """
    return find().exchange(layer._settings.groups_exchange)
