"""Sync views that use the layer, under WSGI and ASGI servers alike."""

from __future__ import annotations

import os
import secrets
import threading
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.http import HttpRequest, HttpResponse, JsonResponse
from prometheus_client import CollectorRegistry, generate_latest

from channels_rabbitmq.prometheus import RabbitmqCollector


def notify(request: HttpRequest, room: str, text: str) -> JsonResponse:
    """Tell a room something, as any view does it."""
    layer: Any = get_channel_layer()
    async_to_sync(layer.group_send)(room, {"type": "chat.message", "text": text})
    return JsonResponse({"pid": os.getpid(), "threads": [t.name for t in threading.enumerate()]})


async def _put_a_job(text: str) -> str:
    layer: Any = get_channel_layer()
    connection = await layer.carehare_connection
    queue = f"test-{secrets.token_hex(8)}"
    await connection.queue_declare(queue, exclusive=True)
    await connection.publish(text.encode(), routing_key=queue)
    async with connection.acking_consumer(queue) as consumer:
        async for body in consumer:
            return body.decode()
    raise RuntimeError("The queue is gone")


def metrics_of_a_registry(request: HttpRequest) -> HttpResponse:
    """Scrape a project's own registry."""
    registry = CollectorRegistry()
    registry.register(RabbitmqCollector(scope="exchange"))
    return HttpResponse(generate_latest(registry), content_type="text/plain; version=0.0.4")


def job(request: HttpRequest, text: str) -> JsonResponse:
    """Put a job into a queue of its own and take it out."""
    return JsonResponse({"job": async_to_sync(_put_a_job)(text)})
