"""Supervisors by themselves, and what they log."""

from __future__ import annotations

import logging

import pytest

from channels_rabbitmq._broker.shared import Shared
from channels_rabbitmq._broker.supervisor import Supervisor
from channels_rabbitmq._settings.settings import Settings
from tests.support.handlers import FakeHandler


def make(handler: FakeHandler, *urls: str, connect_timeout: float = 30) -> Supervisor:
    settings = Settings.from_config({"host": list(urls), "connect_timeout": connect_timeout})
    return Supervisor(handler, settings, id_="crq.a", shared=Shared())


def warnings(logged: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in logged.records if record.levelno >= level]
