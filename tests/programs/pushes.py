"""A project whose files are blocks of the manual: what do its views, signals and tasks push?

pushes.py FOLDER, with the package ``mysite`` in FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer

sys.path.insert(0, sys.argv[1])
os.environ["DJANGO_SETTINGS_MODULE"] = "mysite.settings"

import django

django.setup()

from django.contrib.auth.models import User  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import transaction  # noqa: E402
from django.test import RequestFactory, override_settings  # noqa: E402
from mysite import async_views, celery_tasks, notify, push, signals, views  # noqa: E402, F401


def heard(channel: str, last: str) -> list[Any]:
    """The messages of a channel, up to the one of the type ``last``."""
    messages = []
    while not messages or messages[-1]["type"] != last:
        messages.append(async_to_sync(get_channel_layer().receive)(channel))
    return messages


def main() -> dict[str, Any]:
    call_command("migrate", verbosity=0)
    layer = get_channel_layer()
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.group_add)("user-1", channel)
    get = RequestFactory().get
    with transaction.atomic():
        user = User.objects.create(pk=1, username="ada")
        transaction.set_rollback(True)
    user = User.objects.create(pk=1, username="ada")
    statuses = [views.rename(get("/", {"name": "Ada"}), 1).status_code]
    statuses.append(async_to_sync(async_views.ring)(get("/"), 1).status_code)
    notify.tell(user, "hello")
    celery_tasks.export.apply(args=(1, 2)).get()
    notify.end_websockets(user)
    messages = heard(channel, "logout")
    with override_settings(
        CHANNEL_LAYERS={
            "default": {
                "BACKEND": "channels_rabbitmq.core.RabbitmqChannelLayer",
                "CONFIG": {"host": "amqp://127.0.0.1:1", "operation_timeout": 0.2},
            }
        }
    ):
        push.push("user-1", {"type": "lost"})
        statuses.append(async_to_sync(async_views.ring)(get("/"), 1).status_code)
    return {"messages": messages, "statuses": statuses}


if __name__ == "__main__":
    print(json.dumps(main()))
