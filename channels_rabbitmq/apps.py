"""The Django app: it brings the management command and the system checks."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks

from ._tools.system_checks import TAG, check_channel_layers


class ChannelsRabbitmqConfig(AppConfig):  # type: ignore[misc]  # Django has no types
    """For ``"channels_rabbitmq"`` in ``INSTALLED_APPS``. The layer works without it."""

    name = "channels_rabbitmq"
    verbose_name = "Channels on RabbitMQ"

    def ready(self) -> None:
        checks.register(check_channel_layers, TAG)
