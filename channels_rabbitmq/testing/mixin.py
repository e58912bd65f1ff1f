"""``ChannelLayerMixin``: for the test cases of Django and of Channels."""

from __future__ import annotations

import functools
import multiprocessing
import os
import unittest
from collections.abc import Callable
from typing import Any

from ..core import RabbitmqChannelLayer
from ..exceptions import BrokerUnavailable
from ._run import VARIABLE, begin, join


class ChannelLayerMixin:
    """Gives the tests of a class exchanges of their own, and empties the layers after each test.

    It stands first: ``class ChatTests(ChannelLayerMixin, TransactionTestCase)``. It works with
    ``SimpleTestCase``, ``TestCase``, ``TransactionTestCase``, ``ChannelsLiveServerTestCase`` and
    those of ``unittest``, in each process of ``manage.py test --parallel``, and under pytest.

    Raises ``BrokerUnavailable`` before the first test of a class if a layer in ``CHANNEL_LAYERS``
    finds no RabbitMQ; with the environment variable ``WITHOUT_RABBITMQ=skip`` the class is skipped.
    """

    @classmethod
    def setUpClass(cls) -> None:
        run = begin()
        try:
            for layer in _layers(cls):
                layer._loop_layers.prepare()
        except BrokerUnavailable as err:
            if os.environ.get(VARIABLE) == "skip":
                raise unittest.SkipTest(str(err)) from None
            raise
        process_class = getattr(cls, "ProtocolServerProcess", None)
        is_shared = multiprocessing.get_start_method() == "fork"
        if process_class is not None and not is_shared:
            start = functools.partial(_start_server, process_class, run.token)
            cls.ProtocolServerProcess = staticmethod(start)  # type: ignore[attr-defined]  # the live server's
        super().setUpClass()  # type: ignore[misc]  # the test case's

    def run(self, result: Any = None) -> Any:
        try:
            return super().run(result)  # type: ignore[misc]  # as above
        finally:
            begin().reset()


def _layers(cls: Any) -> list[RabbitmqChannelLayer]:
    """Return the layers of this package that ``CHANNEL_LAYERS`` names; none if a class changes it.

    That comes into force later, and then the first call of a layer finds out.
    """
    from channels.layers import channel_layers  # needs Django's settings

    if "CHANNEL_LAYERS" in (getattr(cls, "_overridden_settings", None) or {}):
        return []
    layers = [channel_layers[alias] for alias in channel_layers.configs]
    return [layer for layer in layers if isinstance(layer, RabbitmqChannelLayer)]


def _start_server(
    process_class: Callable[..., Any],
    token: str,
    host: str,
    get_application: Callable[[], Any],
    **arguments: Any,
) -> Any:
    """Make the process of a live server, which inherits nothing of this one."""
    return process_class(host, functools.partial(_application, token, get_application), **arguments)


def _application(token: str, get_application: Callable[[], Any]) -> Any:
    join(token)
    return get_application()
