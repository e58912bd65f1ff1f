"""A Celery application whose task tells a group of the channel layer what it does.

python -m celery -A celery_app worker
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import kombu
from asgiref.sync import async_to_sync
from celery import Celery
from channels.layers import get_channel_layer


def configured(broker: str | None, name: str) -> Celery:
    """An application with one queue, which goes soon after it, with all that belongs to it."""
    exchange = kombu.Exchange(name, durable=False, auto_delete=True)
    app = Celery("everywhere", broker=broker, set_as_current=False)
    app.conf.update(
        broker_connection_retry_on_startup=True,  # else Celery 5 warns
        task_default_queue=name,
        task_ignore_result=True,
        task_queues=[kombu.Queue(name, exchange, routing_key=name, expires=60.0)],
        worker_enable_remote_control=False,
        worker_prefetch_multiplier=1,
    )
    return app


app = configured(os.environ.get("CELERY_BROKER"), os.environ.get("CELERY_QUEUE", "celery"))


@app.task(name="notify")  # type: ignore[untyped-decorator]  # Celery has no types
def notify(number: int, meeting: str) -> None:
    """Tell the group "tasks", once the other child is in its task with this number, too."""
    layer: Any = get_channel_layer()
    async_to_sync(layer.group_send)("tasks", {"type": "task", "n": number, "pid": os.getpid()})
    (Path(meeting) / f"{number}-{os.getpid()}").touch()
    deadline = time.monotonic() + 10
    while len(list(Path(meeting).glob(f"{number}-*"))) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError("The other child doesn't come")
        time.sleep(0.01)
